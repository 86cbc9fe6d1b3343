// The official Node client.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  BASE_URL, CAPITAL, GET_WEATHER, JSON_TOKENS, KEY, LONG, MAX_TOKENS, MODEL, RESULT,
  UNKNOWN_MODEL, WEATHER, WRONG_KEY, cityOf, main, refused, said, streamed,
} from "./common.mjs";

const open = (apiKey) => new OpenAI({ baseURL: BASE_URL, apiKey, maxRetries: 0, timeout: 60000 });
const client = open(KEY);
const GREEDY = { model: MODEL, temperature: 0, max_completion_tokens: MAX_TOKENS };
const ASKED = [{ role: "user", content: CAPITAL }];
const SKY = [{ role: "user", content: WEATHER }];
const TOOLS = { messages: SKY, tools: [GET_WEATHER] };
const FORCED = {
  ...GREEDY, ...TOOLS, tool_choice: "required", max_completion_tokens: JSON_TOKENS,
};
const City = z.object({ size: z.union([z.literal(1), z.literal(2)]), coastal: z.boolean() });
const create = (body, by = client) => by.chat.completions.create(body);

async function secondTurn(message) {
  const [asked] = message.tool_calls;
  const result = { role: "tool", tool_call_id: asked.id, content: RESULT };
  const messages = [...SKY, message, result];
  const answer = await create({ ...GREEDY, messages, tools: TOOLS.tools });
  const city = cityOf(asked.function.arguments);
  return { city, ...said(answer.choices[0].message.content) };
}

await main({
  chat: async () => {
    const answer = await create({ ...GREEDY, messages: ASKED });
    return said(answer.choices[0].message.content);
  },
  stream: async () => {
    const parts = [];
    let tokens = null;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await create({ ...GREEDY, messages: ASKED, ...options })) {
      parts.push(chunk.choices[0]?.delta?.content ?? "");
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    return streamed(parts, tokens);
  },
  tools: async () => secondTurn((await create(FORCED)).choices[0].message),
  tools_streamed: async () => {
    const whole = await client.chat.completions.stream(FORCED).finalChatCompletion();
    return secondTurn(whole.choices[0].message);
  },
  structured: async () => {
    const answer = await client.chat.completions.parse({
      ...GREEDY, max_completion_tokens: JSON_TOKENS, messages: ASKED,
      response_format: zodResponseFormat(City, "city"),
    });
    return City.parse(answer.choices[0].message.parsed);
  },
  wrong_key: () => refused(
    () => create({ ...GREEDY, messages: ASKED }, open(WRONG_KEY)),
    (error) => error instanceof OpenAI.AuthenticationError, 401,
  ),
  unknown_model: () => refused(
    () => create({ ...GREEDY, model: UNKNOWN_MODEL, messages: ASKED }),
    (error) => error instanceof OpenAI.NotFoundError, 404,
  ),
  too_long: () => refused(
    () => create({ ...GREEDY, messages: [{ role: "user", content: LONG }] }),
    (error) => error instanceof OpenAI.BadRequestError, 400,
  ),
  models: async () => {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    if (!names.includes(MODEL)) throw new Error(`${MODEL} is not in ${names}`);
    return { models: names };
  },
  model: async () => ({ model: (await client.models.retrieve(MODEL)).id }),
  completions: async () => {
    const body = { model: MODEL, prompt: "The capital of Felonia is", temperature: 0 };
    return said((await client.completions.create({ ...body, max_tokens: 12 })).choices[0].text);
  },
});
