// What the Node programs share: the questions, and one JSON line for each call (see common.py).
export const [BASE_URL, MODEL, KEY, ...NAMES] = process.argv.slice(2);
export const ROOT_URL = BASE_URL.replace(/\/v1$/, "");
export const API = process.env.CLIENT_API ?? "chat";
export const WRONG_KEY = "sk-a-key-that-nobody-has-given-out";
export const UNKNOWN_MODEL = "no-such-model";
export const CAPITAL = "What is the capital of Felonia?";
export const WEATHER = "What is the weather in Nemoburg?";
export const RESULT = "clear, 18 degrees";
export const LONG = "The capital of Felonia is a town on the river. ".repeat(500);
export const MAX_TOKENS = 60;
export const JSON_TOKENS = 500;
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
};
export const DESCRIPTION = "Get the weather in a city";
export const GET_WEATHER = {
  type: "function",
  function: { name: "get_weather", description: DESCRIPTION, parameters: PARAMETERS },
};

export function said(text) {
  if (typeof text !== "string" || !text.trim()) throw new Error(`no text: ${JSON.stringify(text)}`);
  return { text: text.slice(0, 60) };
}

export function streamed(parts, tokens) {
  if (parts.filter(Boolean).length < 2) throw new Error(`not streamed: ${JSON.stringify(parts)}`);
  if (!tokens) throw new Error("no usage came with the stream");
  return { ...said(parts.join("")), parts: parts.length, completion_tokens: tokens };
}

export function cityOf(given) {
  const { city } = typeof given === "string" ? JSON.parse(given) : given;
  if (typeof city !== "string") throw new Error(`no city: ${JSON.stringify(given)}`);
  return city;
}

// `right(error)` says whether it is the library's own error for this.
export async function refused(run, right, status) {
  try {
    await run();
  } catch (error) {
    const found = error.statusCode ?? error.status ?? error.cause?.status;
    if (right(error) && found === status) {
      return { error: error.name, code: error.code ?? null, message: error.message.slice(0, 300) };
    }
    throw new Error(`not the error for ${status}: ${told(error)}`);
  }
  throw new Error(`not refused; ${status} is expected`);
}

function told(error) {
  const status = error.statusCode ?? error.status;
  const said = `${error.name}: ${error.message}`.replaceAll("\n", " ").slice(0, 700);
  return status ? `${said} (status ${status})` : said;
}

export async function main(calls) {
  for (const name of NAMES) {
    let line;
    try {
      line = { call: name, ok: true, seen: await calls[name]() };
    } catch (error) {
      line = { call: name, ok: false, error: told(error) };
    }
    console.log(JSON.stringify(line));
  }
}
