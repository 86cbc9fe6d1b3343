// The official Node client on the Responses API.
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  BASE_URL, CAPITAL, DESCRIPTION, JSON_TOKENS, KEY, LONG, MAX_TOKENS, MODEL, PARAMETERS, RESULT,
  UNKNOWN_MODEL, WEATHER, WRONG_KEY, cityOf, main, refused, said, streamed,
} from "./common.mjs";

const open = (apiKey) => new OpenAI({ baseURL: BASE_URL, apiKey, maxRetries: 0, timeout: 60000 });
const client = open(KEY);
const GREEDY = { model: MODEL, temperature: 0, max_output_tokens: MAX_TOKENS };
const SKY = { role: "user", content: WEATHER };
const TOOLS = [{
  type: "function", name: "get_weather", description: DESCRIPTION, parameters: PARAMETERS,
  strict: false,
}];
const FORCED = {
  ...GREEDY, input: [SKY], tools: TOOLS, tool_choice: "required", max_output_tokens: JSON_TOKENS,
};
const City = z.object({ size: z.union([z.literal(1), z.literal(2)]), coastal: z.boolean() });
const create = (body, by = client) => by.responses.create(body);

async function secondTurn({ output }) {
  const asked = output.find((item) => item.type === "function_call");
  const result = { type: "function_call_output", call_id: asked.call_id, output: RESULT };
  const answer = await create({ ...GREEDY, input: [SKY, ...output, result], tools: TOOLS });
  return { city: cityOf(asked.arguments), ...said(answer.output_text) };
}

await main({
  chat: async () => said((await create({ ...GREEDY, input: CAPITAL })).output_text),
  stream: async () => {
    const parts = [];
    let usage;
    for await (const event of client.responses.stream({ ...GREEDY, input: CAPITAL })) {
      if (event.type === "response.output_text.delta") parts.push(event.delta);
      usage = event.response?.usage ?? usage;
    }
    return streamed(parts, usage?.output_tokens);
  },
  tools: async () => secondTurn(await create(FORCED)),
  tools_streamed: async () => secondTurn(await client.responses.stream(FORCED).finalResponse()),
  structured: async () => {
    const answer = await client.responses.parse({
      ...GREEDY, max_output_tokens: JSON_TOKENS, input: CAPITAL,
      text: { format: zodTextFormat(City, "city") },
    });
    return City.parse(answer.output_parsed);
  },
  wrong_key: () => refused(
    () => create({ ...GREEDY, input: CAPITAL }, open(WRONG_KEY)),
    (error) => error instanceof OpenAI.AuthenticationError, 401,
  ),
  unknown_model: () => refused(
    () => create({ ...GREEDY, model: UNKNOWN_MODEL, input: CAPITAL }),
    (error) => error instanceof OpenAI.NotFoundError, 404,
  ),
  too_long: () => refused(
    () => create({ ...GREEDY, input: LONG }),
    (error) => error instanceof OpenAI.BadRequestError, 400,
  ),
  stored: async () => {
    const first = await create({ ...GREEDY, input: CAPITAL, store: true });
    const next = { ...GREEDY, input: "And its river?", previous_response_id: first.id };
    const second = await create(next);
    const read = await client.responses.retrieve(first.id);
    if (read.output_text !== first.output_text) throw new Error("the kept answer is another");
    await client.responses.delete(first.id);
    return said(second.output_text);
  },
});
