// Sampling settings. One that nobody touched is not sent, so the server's own holds.
import { getKey, setKey } from "./api.js";

const inputs = [...document.querySelectorAll("#settings .grid input")];
const key = document.querySelector("#key");

function show(input) {
  const isSet = input.dataset.set === "yes";
  const value = input.parentElement.querySelector(".value");
  if (!value) return;
  const text = `${input.dataset.default ?? ""} (server default)`.trim();
  value.textContent = isSet ? input.value : text;
  if (isSet) input.removeAttribute("aria-valuetext");
  else input.setAttribute("aria-valuetext", text);
}

/** Shows the server's own values where the user chose none. */
export function showDefaults(defaults) {
  for (const input of inputs) {
    const value = defaults[input.id];
    if (value === undefined || value === null) continue;
    input.dataset.default = String(value);
    if (input.type === "range") input.defaultValue = value;
    else input.placeholder = `${value} (server default)`;
    if (input.type === "range" && !input.dataset.set) input.value = value;
    show(input);
  }
}

function reset() {
  for (const input of inputs) {
    input.value = input.defaultValue;
    delete input.dataset.set;
    show(input);
  }
}

for (const input of inputs) {
  input.addEventListener("input", () => {
    if (input.value === "") delete input.dataset.set;
    else input.dataset.set = "yes";
    show(input);
  });
}
document.querySelector("#reset").addEventListener("click", reset);
reset();

key.value = getKey();
key.addEventListener("change", () => setKey(key.value.trim()));

/** The settings that the user chose, as fields of a request. */
export const chosenSettings = () =>
  Object.fromEntries(inputs.filter((i) => i.dataset.set).map((i) => [i.id, Number(i.value)]));

/** Shows the field of the API key. */
export function askForKey() {
  document.querySelector("#settings").open = true;
  key.focus();
}
