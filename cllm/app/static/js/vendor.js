// Libraries that are no modules: their script is added to the page once, when it is first needed.

const loading = new Map();

/** Loads vendor/FILE and answers the global `name` that it defines. */
export function classicScript(file, name) {
  if (!loading.has(file)) loading.set(file, new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `vendor/${file}`;
    script.onload = () => resolve(window[name]);
    script.onerror = () => {
      loading.delete(file); // a lost connection must not break the page for good
      script.remove();
      reject(new Error(`vendor/${file} could not be loaded. Reload the page.`));
    };
    document.head.append(script);
  }));
  return loading.get(file);
}
