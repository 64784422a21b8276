// A conversation of two speakers. The server keeps its turns; this tab keeps its id.
import { request } from "./api.js";

const ID = "voxkern.conversation";
const list = document.querySelector("#turns");

function newId() {
  const random = crypto.getRandomValues(new Uint32Array(2));
  return `page-${Array.from(random, (number) => number.toString(36)).join("")}`;
}

let id = sessionStorage.getItem(ID) ?? newId();

/** The id, as a field of a request. */
export const conversationId = () => id;

const path = (rest = "") => `v1/conversations/${id}${rest}`;

function bubble({ speaker, text, seconds, generated, pending }) {
  const item = document.createElement("li");
  const about = document.createElement("small");
  item.dataset.speaker = speaker;
  item.textContent = text;
  const length = pending ? "…" : `${seconds.toFixed(1)} s`;
  about.textContent = `Speaker ${speaker}, ${length}${generated === false ? ", recorded" : ""}`;
  item.append(about);
  item.classList.toggle("pending", Boolean(pending));
  return item;
}

/** Shows a turn that is being spoken. */
export function addPending(speaker, text) {
  list.append(bubble({ speaker, text, pending: true }));
  list.lastChild.scrollIntoView({ block: "nearest" });
}

/** Shows the turns as the server has them; if it has none, the one that did not come about goes. */
export async function refreshTurns() {
  let shown;
  try {
    shown = await (await request(path())).json();
  } catch (error) {
    list.querySelector(".pending")?.remove();
    throw error;
  }
  sessionStorage.setItem(ID, id);
  list.replaceChildren(...shown.turns.map(bubble));
}

/** Adds a turn that a person spoke: a recording (Blob or File) and its words. */
export async function addRecorded(speaker, text, audio) {
  addPending(speaker, text);
  const form = new FormData();
  form.append("speaker", speaker);
  form.append("text", text);
  form.append("audio", audio, audio.name ?? "turn.wav");
  try {
    await request(path("/turns"), { method: "POST", form });
  } finally {
    await refreshTurns().catch(() => {});
  }
}

/** Shows the turns that a reload of the page left. */
export async function restoreTurns() {
  if (sessionStorage.getItem(ID)) await refreshTurns().catch(() => sessionStorage.removeItem(ID));
}

/** Tells the server how much of the answer was heard; returns the words of it that are kept. */
export async function interrupt(playedMs) {
  const json = { played_ms: Math.round(playedMs) };
  const answer = await request(path("/interrupt"), { method: "POST", json });
  return answer.json();
}

/** Deletes the conversation and begins another. */
export async function forget() {
  const old = path();
  const existed = list.children.length > 0;
  sessionStorage.removeItem(ID);
  id = newId();
  list.replaceChildren();
  if (existed) await request(old, { method: "DELETE" }).catch(() => {});
}
