// How the list of picked pictures looks, in ComfyUI's own colours.

export const ROW = 132 // of cards, with the gap
export const NARROWEST = 112
const CAPTION = 22
export const THUMB = ROW - 6 - CAPTION - 2 // the height of its place: without gap, caption and borders

export const STYLE = `
.sa-picker { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; box-sizing: border-box;
  color: var(--input-text); font: 11px sans-serif; overflow: hidden; position: relative; }
.sa-picker * { box-sizing: border-box; }
.sa-picker [hidden] { display: none; }
.sa-picker button { background: var(--comfy-input-bg); color: var(--input-text); border: 1px solid var(--border-color);
  border-radius: 4px; padding: 2px 6px; font: inherit; cursor: pointer; white-space: nowrap; }
.sa-picker button:hover { border-color: var(--input-text); }
.sa-picker :focus-visible { outline: 2px solid var(--input-text); outline-offset: -2px; }
.sa-bar { display: flex; gap: 4px; align-items: center; flex: 0 0 24px; }
.sa-said { flex: 1; min-width: 0; color: var(--descrip-text); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.sa-note { flex: none; line-height: 14px; max-height: 42px; overflow: hidden auto; }
.sa-note[data-bad] { color: var(--error-text); }
.sa-note:empty { display: none; }
.sa-cards { flex: 1 1 0; min-height: 0; display: grid; gap: 6px; overflow: hidden auto; align-content: start;
  grid-template-columns: repeat(auto-fill, minmax(${NARROWEST}px, 1fr)); }
.sa-picker[data-unused] .sa-cards { opacity: 0.4; }
.sa-picker[data-none] .sa-cards, .sa-picker[data-none] .sa-note:empty { display: none; }
.sa-picker[data-none]:not([data-unused]) { border: 1px dashed var(--border-color); border-radius: 6px; padding: 6px 8px;
  justify-content: center; }
.sa-picker[data-over]::after { content: ""; position: absolute; inset: 0; border: 2px solid var(--input-text);
  border-radius: 6px; pointer-events: none; }
.sa-pic { position: relative; display: flex; flex-direction: column; height: ${ROW - 6}px; min-width: 0;
  background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 6px; overflow: hidden; }
.sa-pic[data-drop="before"]::before, .sa-pic[data-drop="after"]::before { content: ""; position: absolute; top: 0;
  bottom: 0; width: 3px; background: var(--input-text); z-index: 3; }
.sa-pic[data-drop="before"]::before { left: 0; }
.sa-pic[data-drop="after"]::before { right: 0; }
.sa-thumb { position: relative; flex: 1; min-height: 0; display: flex; align-items: center; justify-content: center;
  background: rgb(0 0 0 / 35%); cursor: grab; }
.sa-whole { position: relative; overflow: hidden; isolation: isolate; }
.sa-whole img { display: block; width: 100%; height: 100%; pointer-events: none; }
.sa-whole .sa-counts { position: absolute; inset: 0; mix-blend-mode: multiply; opacity: 0.8; }
.sa-whole .sa-counts[data-inverted] { filter: invert(1); }
.sa-cut { position: absolute; border: 1px solid #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / 60%), 0 0 0 999px rgb(0 0 0 / 55%);
  pointer-events: none; }
.sa-number { position: absolute; left: 3px; top: 3px; min-width: 16px; padding: 1px 4px; border-radius: 8px; z-index: 2;
  background: rgb(0 0 0 / 65%); color: #fff; text-align: center; pointer-events: none; }
.sa-tools { position: absolute; right: 3px; top: 3px; display: flex; gap: 2px; z-index: 2; opacity: 0; }
.sa-pic:hover .sa-tools, .sa-pic:focus-within .sa-tools { opacity: 1; }
.sa-pic .sa-tools button { width: 20px; height: 20px; padding: 0; border: 0; color: #fff; background: rgb(0 0 0 / 65%); }
.sa-pic .sa-tools button:hover, .sa-pic .sa-tools button[aria-pressed="true"] { background: #fff; color: #000; }
.sa-pic .sa-tools .pi { font-size: 11px; }
.sa-fault { position: absolute; left: 0; right: 0; bottom: 0; z-index: 2; padding: 1px 4px; color: #fff;
  background: rgb(150 90 0 / 85%); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; pointer-events: none; }
.sa-pic[data-bad] .sa-fault { background: rgb(170 30 30 / 90%); }
.sa-gone { padding: 0 6px; color: var(--descrip-text); text-align: center; overflow-wrap: anywhere; max-height: 60px;
  overflow: hidden; }
.sa-caption { flex: none; width: 100%; height: ${CAPTION}px; border: 0; border-top: 1px solid var(--border-color); padding: 0 5px;
  background: transparent; color: var(--input-text); font: inherit; }
.sa-caption::placeholder { color: var(--descrip-text); opacity: 0.8; }
`
