"""From a folder of pictures to the rows of a batch."""
