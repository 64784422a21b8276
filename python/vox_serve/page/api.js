// Requests to the server. All URLs are relative to the page's own place.

export const base = new URL("../", import.meta.url);

const KEY = "voxkern.key"; // in sessionStorage: the key is gone when the tab is closed

export const getKey = () => sessionStorage.getItem(KEY) ?? "";

export const setKey = (key) =>
  key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY);

/** A refusal of the server, or its absence (status 0). */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Sends a request; throws an ApiError unless the answer is a success. */
export async function request(path, { method = "GET", json, form, signal } = {}) {
  const headers = {};
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  if (json) headers["Content-Type"] = "application/json";
  const body = json ? JSON.stringify(json) : form;
  let answer;
  try {
    answer = await fetch(new URL(path, base), { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    throw signal?.aborted ? error : new ApiError("The server does not answer.", 0);
  }
  if (!answer.ok) throw new ApiError(await explain(answer), answer.status);
  return answer;
}

async function explain(answer) {
  if (answer.status === 401) return "This server needs an API key. Type it below.";
  const { detail } = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  const reason = Array.isArray(detail)
    ? detail.map(({ loc, msg }) => `${loc.slice(1).join(".")}: ${msg}`).join("; ")
    : detail ?? `the server answered ${answer.status}`;
  return reason + (wait ? ` (try again in ${wait} s)` : "");
}

const AWAY_MS = 1500;
const THERE_MS = 15000;

/**
 * Reports whether the server is there, again and again while the page is visible.
 * Returns a function that looks at once.
 */
export function watchServer(report) {
  let timer;
  async function look() {
    clearTimeout(timer);
    let state = "ready";
    try {
      const answer = await fetch(new URL("health/ready", base), { cache: "no-store" });
      if (!answer.ok) state = (await answer.json().catch(() => ({}))).reason ?? "not ready";
    } catch {
      state = "away";
    }
    report(state);
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(look, state === "ready" ? THERE_MS : AWAY_MS);
  }
  document.addEventListener("visibilitychange", () => document.hidden || look());
  look();
  return look;
}
