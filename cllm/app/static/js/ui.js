// What all tabs are made of.

export { button, empty, progress, spinner, badge, toast, liveText, facts } from "./ui/base.js";
export { field, form } from "./ui/form.js";
export { table } from "./ui/table.js";
export { confirm, dialog } from "./ui/dialog.js";
export { pathPicker } from "./ui/picker.js";
export { fetchedTab } from "./ui/tab.js";
