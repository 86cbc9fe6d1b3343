// Anthropic's Node client.
import Anthropic from "@anthropic-ai/sdk";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";
import {
  CAPITAL, DESCRIPTION, JSON_TOKENS, KEY, LONG, MAX_TOKENS, MODEL, PARAMETERS, RESULT, ROOT_URL,
  UNKNOWN_MODEL, WEATHER, WRONG_KEY, cityOf, main, refused, said, streamed,
} from "./common.mjs";

const open = (apiKey) => new Anthropic({ baseURL: ROOT_URL, apiKey, maxRetries: 0, timeout: 60000 });
const client = open(KEY);
const GREEDY = { model: MODEL, temperature: 0, max_tokens: MAX_TOKENS };
const ASKED = [{ role: "user", content: CAPITAL }];
const SKY = [{ role: "user", content: WEATHER }];
const TOOLS = [{ name: "get_weather", description: DESCRIPTION, input_schema: PARAMETERS }];
const FORCED = {
  ...GREEDY, messages: SKY, tools: TOOLS, tool_choice: { type: "any" }, max_tokens: JSON_TOKENS,
};
const City = z.object({ size: z.union([z.literal(1), z.literal(2)]), coastal: z.boolean() });
const create = (body, by = client) => by.messages.create(body);
const textOf = ({ content }) => content.map((block) => block.text ?? "").join("");

async function secondTurn(message) {
  if (message.stop_reason !== "tool_use") throw new Error(`stop_reason ${message.stop_reason}`);
  const asked = message.content.find((block) => block.type === "tool_use");
  const result = { type: "tool_result", tool_use_id: asked.id, content: RESULT };
  const messages = [
    ...SKY, { role: "assistant", content: message.content }, { role: "user", content: [result] },
  ];
  const answer = await create({ ...GREEDY, messages, tools: TOOLS });
  return { city: cityOf(asked.input), ...said(textOf(answer)) };
}

await main({
  chat: async () => said(textOf(await create({ ...GREEDY, messages: ASKED }))),
  stream: async () => {
    const parts = [];
    const running = client.messages.stream({ ...GREEDY, messages: ASKED });
    running.on("text", (part) => parts.push(part));
    return streamed(parts, (await running.finalMessage()).usage.output_tokens);
  },
  tools: async () => secondTurn(await create(FORCED)),
  tools_streamed: async () => secondTurn(await client.messages.stream(FORCED).finalMessage()),
  structured: async () => {
    const answer = await client.messages.parse({
      ...GREEDY, max_tokens: JSON_TOKENS, messages: ASKED,
      output_config: { format: zodOutputFormat(City) },
    });
    return City.parse(answer.parsed_output);
  },
  wrong_key: () => refused(
    () => create({ ...GREEDY, messages: ASKED }, open(WRONG_KEY)),
    (error) => error instanceof Anthropic.AuthenticationError, 401,
  ),
  unknown_model: () => refused(
    () => create({ ...GREEDY, model: UNKNOWN_MODEL, messages: ASKED }),
    (error) => error instanceof Anthropic.NotFoundError, 404,
  ),
  too_long: () => refused(
    () => create({ ...GREEDY, messages: [{ role: "user", content: LONG }] }),
    (error) => error instanceof Anthropic.BadRequestError, 400,
  ),
  count_tokens: async () => {
    const { input_tokens: counted } = await client.messages.countTokens({
      model: MODEL, messages: ASKED,
    });
    if (!(counted > 0)) throw new Error(`input_tokens: ${counted}`);
    return { counted };
  },
});
