// Vercel's AI SDK with its providers: for compatible servers, OpenAI (Responses), Anthropic.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import {
  API, BASE_URL, CAPITAL, DESCRIPTION, JSON_TOKENS, KEY, LONG, MAX_TOKENS, MODEL, PARAMETERS, RESULT,
  UNKNOWN_MODEL, WEATHER, WRONG_KEY, cityOf, main, refused, said, streamed,
} from "./common.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const City = z.object({ size: z.union([z.literal(1), z.literal(2)]), coastal: z.boolean() });

function languageModel(name, apiKey) {
  const where = { baseURL: BASE_URL, apiKey };
  if (API === "responses") return createOpenAI(where).responses(name);
  if (API === "messages") return createAnthropic(where).messages(name);
  const options = { name: "packhorse", includeUsage: true, supportsStructuredOutputs: true };
  return createOpenAICompatible({ ...where, ...options }).chatModel(name);
}

function asked(prompt, { key = KEY, model = MODEL, ...more } = {}) {
  const limits = { temperature: 0, maxOutputTokens: MAX_TOKENS, maxRetries: 0 };
  return { model: languageModel(model, key), prompt, ...limits, ...more };
}

// The first turn must call; a tiny model does not always do so by itself.
const TOOLS = {
  maxOutputTokens: JSON_TOKENS,
  prepareStep: ({ stepNumber }) => (stepNumber === 0 ? { toolChoice: "required" } : {}),
  stopWhen: stepCountIs(3),
  tools: {
    get_weather: tool({
      description: DESCRIPTION, inputSchema: jsonSchema(PARAMETERS), execute: async () => RESULT,
    }),
  },
};

function looped(steps, text) {
  const [call] = steps[0].toolCalls;
  return { city: cityOf(call.input), ...said(text) };
}

const isCallError = (error) => APICallError.isInstance(error);

await main({
  chat: async () => said((await generateText(asked(CAPITAL))).text),
  stream: async () => {
    const running = streamText({ ...asked(CAPITAL), onError: () => {} });
    const parts = [];
    for await (const part of running.textStream) parts.push(part);
    return streamed(parts, (await running.usage).outputTokens);
  },
  tools: async () => {
    const { steps, text } = await generateText(asked(WEATHER, TOOLS));
    return looped(steps, text);
  },
  tools_streamed: async () => {
    let fault;
    const running = streamText({ ...asked(WEATHER, TOOLS), onError: ({ error }) => { fault = error; } });
    await running.consumeStream();
    if (fault) throw fault;
    return looped(await running.steps, await running.text);
  },
  structured: async () => {
    const output = Output.object({ schema: City });
    const more = { output, maxOutputTokens: JSON_TOKENS };
    return City.parse((await generateText(asked(CAPITAL, more))).output);
  },
  wrong_key: () => refused(() => generateText(asked(CAPITAL, { key: WRONG_KEY })), isCallError, 401),
  unknown_model: () => refused(
    () => generateText(asked(CAPITAL, { model: UNKNOWN_MODEL })), isCallError, 404,
  ),
  too_long: () => refused(() => generateText(asked(LONG)), isCallError, 400),
});
