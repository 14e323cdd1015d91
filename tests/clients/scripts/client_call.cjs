// What the node scripts share: a task on standard input, its result as JSON on the last line.
const { readFileSync } = require("node:fs");

exports.main = async (calls) => {
  const task = JSON.parse(readFileSync(0, "utf8"));
  console.log("\n" + JSON.stringify(await calls[process.argv[2]](task)));
};

exports.outcome = async (call) => {
  try {
    await call();
  } catch (error) {
    return {
      class: error.constructor.name,
      status: error.status ?? null,
      request_id: error.requestID ?? null,
      headers: Object.fromEntries(error.headers?.entries() ?? []),
      message: error.message,
    };
  }
  return { class: null };
};

exports.text = async (stream, part) => {
  let found = "";
  for await (const event of stream) found += part(event) ?? "";
  return found;
};

// A `fetch` that notes the status of each answer.
exports.noting = (statuses) => async (...request) => {
  const response = await fetch(...request);
  statuses.push(response.status);
  return response;
};
