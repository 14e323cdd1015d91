// The openai package's calls, as in openai_calls.py.
const OpenAI = require("openai").default;
const { main, noting, outcome, text } = require("./client_call.cjs");

const client = (task, key, retries = 0, statuses = []) =>
  new OpenAI({
    baseURL: `${task.url}/v1`,
    apiKey: key ?? task.key,
    maxRetries: retries,
    timeout: 60000,
    fetch: noting(statuses),
  });

async function answers(task) {
  const asked = client(task);
  const found = {};
  for (const [model, prompt] of Object.entries(task.prompts)) {
    const plain = { model, max_tokens: task.max_tokens, temperature: 0 };
    const chat = { ...plain, messages: [{ role: "user", content: prompt }] };
    const response = {
      model,
      input: prompt,
      max_output_tokens: task.max_tokens,
      temperature: 0,
      store: false,
    };
    found[model] = {
      completions: (await asked.completions.create({ ...plain, prompt })).choices[0].text,
      chat: (await asked.chat.completions.create(chat)).choices[0].message.content,
      "chat, streamed": await text(
        await asked.chat.completions.create({ ...chat, stream: true }),
        (part) => part.choices[0]?.delta.content,
      ),
      responses: (await asked.responses.create(response)).output_text,
      "responses, streamed": await text(
        await asked.responses.create({ ...response, stream: true }),
        (event) => (event.type === "response.output_text.delta" ? event.delta : ""),
      ),
    };
  }
  return found;
}

async function models(task) {
  const asked = client(task);
  const listed = {};
  for await (const each of asked.models.list()) listed[each.id] = each.max_model_len;
  const one = await asked.models.retrieve(task.model);
  return {
    listed,
    retrieved: [one.id, one.max_model_len, one.parent],
    unknown: await outcome(() => asked.models.retrieve("unknown")),
  };
}

async function headers(task) {
  const { data, response } = await client(task)
    .completions.create(
      { model: task.model, prompt: task.prompts[task.model], max_tokens: 1 },
      { headers: { "X-Request-Id": "asked-by-openai" } },
    )
    .withResponse();
  return {
    headers: Object.fromEntries(response.headers.entries()),
    request_id: data._request_id,
  };
}

async function errors(task) {
  const ask = (fields, key) =>
    outcome(() =>
      client(task, key).completions.create({
        model: task.model,
        prompt: "t1",
        max_tokens: 1,
        ...fields,
      }),
    );
  const body = { lora_name: task.model, lora_path: task.folder };
  const load = (key) => outcome(() => client(task, key).post("/load_lora_adapter", { body }));
  return {
    "wrong key": await ask({}, "wrong"),
    "not allowed": await load(),
    "name taken": await load(task.admin_key),
    "unknown model": await ask({ model: "unknown" }),
    "broken adapter": await ask({ model: task.broken }),
    "bad field": await ask({ max_tokens: -1 }),
  };
}

async function retried(task) {
  const key = task.with_key;
  const statuses = [];
  const fields = { model: task.model, prompt: task.prompt, temperature: 0 };
  if (task.spends) {
    await client(task, key).completions.create({ ...fields, max_tokens: task.long_answer });
  }
  fields.max_tokens = task.max_tokens;
  const once = await outcome(() => client(task, key).completions.create(fields));
  const answer = await client(task, key, 2, statuses).completions.create(fields);
  return { once, text: answer.choices[0].text, statuses };
}

main({ answers, models, headers, errors, retried });
