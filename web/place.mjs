// The place of a node's element in the page, and its node's room for it.

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

/** Give a node room for what it shows, at least `width`. */
export function grow(node, width = 0) {
  node.setSize?.([Math.max(node.size[0], width), Math.max(node.size[1], node.computeSize()[1])])
  node.setDirtyCanvas?.(true, true)
}

/** Put what a node shows into it, as a widget that is not saved. */
export function addView(node, name, type, view) {
  const widget = node.addDOMWidget(name, type, view.root, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => view.height,
  })
  widget.serialize = false
  keepPlace(node, view.root)
  grow(node)
}
