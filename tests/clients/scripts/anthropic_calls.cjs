// The @anthropic-ai/sdk package's calls, as in anthropic_calls.py.
const Anthropic = require("@anthropic-ai/sdk").default;
const { main, noting, outcome } = require("./client_call.cjs");

const client = (task, key, retries = 0, statuses = []) =>
  new Anthropic({
    baseURL: task.url,
    apiKey: key ?? task.key,
    maxRetries: retries,
    timeout: 60000,
    fetch: noting(statuses),
  });

const message = (task, model, prompt = "t1", fields = {}) => ({
  model,
  messages: [{ role: "user", content: prompt }],
  max_tokens: task.max_tokens,
  temperature: 0,
  ...fields,
});

async function answers(task) {
  const found = {};
  for (const [model, prompt] of Object.entries(task.prompts)) {
    const body = message(task, model, prompt);
    found[model] = {
      messages: (await client(task).messages.create(body)).content[0].text,
      "messages, streamed": await client(task).messages.stream(body).finalText(),
    };
  }
  return found;
}

async function models(task) {
  const asked = client(task);
  const listed = [];
  for await (const each of asked.models.list()) listed.push(each.id);
  const { messages } = message(task, task.model, task.prompts[task.model]);
  const counted = await asked.messages.countTokens({ model: task.model, messages });
  return {
    listed,
    retrieved: (await asked.models.retrieve(task.model)).id,
    unknown: await outcome(() => asked.models.retrieve("unknown")),
    tokens: counted.input_tokens,
  };
}

async function headers(task) {
  const { response } = await client(task)
    .messages.create(message(task, task.model), {
      headers: { "X-Request-Id": "asked-by-anthropic" },
    })
    .withResponse();
  return { headers: Object.fromEntries(response.headers.entries()) };
}

async function errors(task) {
  const ask = (model, key, fields) =>
    outcome(() => client(task, key).messages.create(message(task, model, "t1", fields)));
  return {
    "wrong key": await ask(task.model, "wrong"),
    "unknown model": await ask("unknown"),
    "broken adapter": await ask(task.broken),
    "bad field": await ask(task.model, undefined, { max_tokens: -1 }),
  };
}

async function retried(task) {
  const key = task.with_key;
  const statuses = [];
  const body = message(task, task.model, task.prompt);
  if (task.spends) {
    await client(task, key).messages.create({ ...body, max_tokens: task.long_answer });
  }
  const once = await outcome(() => client(task, key).messages.create(body));
  const answer = await client(task, key, 2, statuses).messages.create(body);
  return { once, text: answer.content[0].text, statuses };
}

main({ answers, models, headers, errors, retried });
