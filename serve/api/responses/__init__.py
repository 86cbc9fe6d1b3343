"""OpenAI's Responses API: bodies to chat requests, chunks to items and events, kept responses."""
