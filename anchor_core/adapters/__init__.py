"""What is trained: kinds of adapter, the layers they take, token vectors, and their files."""
