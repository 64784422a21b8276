// The description of the API, made of openapi.json.
import { request, setKey } from "./api.js";

const $ = (id) => document.getElementById(id);

function element(name, content = [], attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content].flat());
  return made;
}

/** The schema that a reference stands for. */
const resolved = (api, schema) =>
  schema.$ref ? schema.$ref.slice(2).split("/").reduce((part, name) => part[name], api) : schema;

/** The values that a schema takes, in words. */
function kind(api, schema) {
  const { type, anyOf, enum: values, items, format, ...rest } = resolved(api, schema);
  if (anyOf) return [...new Set(anyOf.map((one) => kind(api, one)))].join(" or ");
  if (values) return values.map((value) => JSON.stringify(value)).join(", ");
  const low = rest.minimum ?? rest.exclusiveMinimum;
  const high = rest.maximum ?? rest.exclusiveMaximum;
  const above = rest.exclusiveMinimum === undefined ? "from" : "above";
  const bounds = [low === undefined ? "" : ` ${above} ${low}`, high === undefined ? "" : ` to ${high}`];
  const of = items ? ` of ${kind(api, items)}` : "";
  return `${format === "binary" ? "file" : type ?? "any"}${of}${bounds.join("")}`;
}

function fields(api, schema) {
  const { properties, required = [] } = resolved(api, schema);
  const rows = Object.entries(properties ?? {}).map(([name, field]) => {
    const notes = [field.description ?? ""];
    if (field.default !== undefined && field.default !== null) notes.push(`default ${JSON.stringify(field.default)}`);
    if (required.includes(name)) notes.push("required");
    const cells = [element("code", name), kind(api, field), notes.filter(Boolean).join("; ")];
    return element("tr", cells.map((cell) => element("td", cell)));
  });
  const head = element("tr", ["field", "values", "meaning"].map((name) => element("th", name, { scope: "col" })));
  return element("div", element("table", [element("thead", head), element("tbody", rows)]), { class: "scroll", tabindex: 0 });
}

function operation(api, path, method, { description, summary, requestBody, responses }) {
  const title = element("summary", [element("code", `${method.toUpperCase()} ${path}`)]);
  const parts = [title, element("p", description ?? summary ?? "")];
  const shapes = new Map(); // media types with the same fields are shown together
  for (const [type, { schema = {} }] of Object.entries(requestBody?.content ?? {})) {
    const { properties } = resolved(api, schema);
    const key = Object.keys(properties ?? {}).join();
    if (!properties) parts.push(element("p", type));
    else shapes.set(key, { schema, types: [...(shapes.get(key)?.types ?? []), type] });
  }
  for (const { schema, types } of shapes.values()) {
    parts.push(element("h2", types.join(", ")), fields(api, schema));
  }
  const answers = Object.entries(responses ?? {}).map(([status, answer]) => {
    const types = Object.keys(answer.content ?? {}).join(", ");
    return element("li", `${status}: ${answer.description}${types ? ` (${types})` : ""}`);
  });
  parts.push(element("h2", "Answers"), element("ul", answers));
  return element("details", parts, { class: "sheet" });
}

async function show() {
  try {
    const api = await (await request("openapi.json")).json();
    const routes = Object.entries(api.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, about]) => operation(api, path, method, about)),
    );
    $("routes").replaceChildren(...routes);
    $("note").textContent = `${routes.length} routes. The WebSocket for text in pieces is described in docs/live.md.`;
    $("key-form").hidden = true;
  } catch (error) {
    $("note").textContent = error.message;
    $("key-form").hidden = error.status !== 401;
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  show();
});
show();
