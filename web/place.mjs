// The place of a node's element in the page.

/**
 * An undo makes every node anew under its old id, and Nodes 2.0 goes on showing the element of the one before: have
 * the new node's take its place.
 */
export function keepPlace(node, element) {
  const { onAdded, onRemoved } = node
  node.onAdded = function () {
    onAdded?.apply(this, arguments)
    delete element.dataset.gone
    document.querySelector(`.${element.classList[0]}[data-gone="${this.id}"]`)?.replaceWith(element)
  }
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments)
    element.dataset.gone = this.id
  }
}
