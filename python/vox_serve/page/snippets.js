// The request of the page as programs for other places. The API key stays out of them.

const VARIABLE = "VOX_SERVE_API_KEY";

const shellQuoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** A JSON value as Python writes it. */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value).map(([k, v]) => `    ${JSON.stringify(k)}: ${python(v)},\n`);
  return `{\n${entries.join("")}}`;
}

export const snippets = {
  curl(url, body, withKey) {
    const key = withKey ? ` \\\n  -H "Authorization: Bearer $${VARIABLE}"` : "";
    const json = shellQuoted(JSON.stringify(body));
    return `curl -N ${shellQuoted(url)} -o speech.wav${key} \\
  -H 'Content-Type: application/json' \\
  -d ${json}
`;
  },

  python(url, body, withKey) {
    const key = withKey ? `headers["Authorization"] = "Bearer " + os.environ["${VARIABLE}"]\n` : "";
    return `import json
${withKey ? "import os\n" : ""}import shutil
import urllib.request

body = ${python(body)}
headers = {"Content-Type": "application/json"}
${key}request = urllib.request.Request(${JSON.stringify(url)}, json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as answer, open("speech.wav", "wb") as file:
    shutil.copyfileobj(answer, file)  # arrives while it is made
`;
  },

  javascript(url, body, withKey) {
    const key = withKey ? `\n    Authorization: "Bearer " + process.env.${VARIABLE},` : "";
    return `import { writeFile } from "node:fs/promises";

const answer = await fetch(${JSON.stringify(url)}, {
  method: "POST",
  headers: {
    "Content-Type": "application/json",${key}
  },
  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),
});
if (!answer.ok) throw new Error(await answer.text());
await writeFile("speech.wav", answer.body); // arrives while it is made
`;
  },
};
