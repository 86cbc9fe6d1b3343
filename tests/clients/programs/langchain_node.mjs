// LangChain.js's ChatOpenAI, on chat completions or Responses.
import { ContextOverflowError } from "@langchain/core/errors";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";
import {
  API, BASE_URL, CAPITAL, GET_WEATHER, JSON_TOKENS, KEY, LONG, MAX_TOKENS, MODEL, RESULT,
  UNKNOWN_MODEL, WEATHER, WRONG_KEY, cityOf, main, refused, said, streamed,
} from "./common.mjs";

const City = z.object({ size: z.union([z.literal(1), z.literal(2)]), coastal: z.boolean() });
const SKY = new HumanMessage(WEATHER);

const open = ({ apiKey = KEY, model = MODEL, maxTokens = MAX_TOKENS } = {}) => new ChatOpenAI({
  model, apiKey, maxTokens, temperature: 0, maxRetries: 0, timeout: 60000, streamUsage: true,
  configuration: { baseURL: BASE_URL }, useResponsesApi: API === "responses",
});
const bound = (choice) => open({ maxTokens: JSON_TOKENS }).bindTools([GET_WEATHER], { tool_choice: choice });

async function secondTurn(first) {
  const [asked] = first.tool_calls;
  const result = new ToolMessage({ content: RESULT, tool_call_id: asked.id });
  const answer = await bound("auto").invoke([SKY, first, result]);
  return { city: cityOf(asked.args), ...said(answer.text) };
}

await main({
  chat: async () => said((await open().invoke(CAPITAL)).text),
  stream: async () => {
    const parts = [];
    let tokens = null;
    for await (const chunk of await open().stream(CAPITAL)) {
      parts.push(chunk.text);
      tokens = chunk.usage_metadata?.output_tokens || tokens;
    }
    return streamed(parts, tokens);
  },
  tools: async () => secondTurn(await bound("required").invoke([SKY])),
  tools_streamed: async () => {
    let whole;
    for await (const chunk of await bound("required").stream([SKY])) {
      whole = whole ? whole.concat(chunk) : chunk;
    }
    return secondTurn(whole);
  },
  structured: async () => {
    const asking = open({ maxTokens: JSON_TOKENS }).withStructuredOutput(City);
    return City.parse(await asking.invoke(CAPITAL));
  },
  wrong_key: () => refused(
    () => open({ apiKey: WRONG_KEY }).invoke(CAPITAL), (error) => error.status === 401, 401,
  ),
  unknown_model: () => refused(
    () => open({ model: UNKNOWN_MODEL }).invoke(CAPITAL), (error) => error.status === 404, 404,
  ),
  too_long: () => refused(
    () => open().invoke(LONG), (error) => ContextOverflowError.isInstance(error), 400,
  ),
});
