"""The calls of SageMaker's runtime client: what AWS does between it and the container is replayed.

AWS takes `POST /endpoints/NAME/invocations` to the container's `POST /invocations`, and the adapter
component that a call names becomes a header.
"""

import json
from typing import Any

import botocore.exceptions
import botocore.session
from botocore.config import Config
from client_call import main

_ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"


def client(task: dict[str, Any]) -> Any:
    session = botocore.session.Session()
    session.set_credentials("access", "secret")
    asked = session.create_client(
        "sagemaker-runtime",
        region_name="us-east-1",
        endpoint_url=task["url"],
        config=Config(retries={"max_attempts": 0}),
    )

    def to_container(request: Any, **_: Any) -> None:
        adapter = request.headers.get("X-Amzn-SageMaker-Inference-Component")
        request.url = f"{task['url']}/invocations"
        if adapter:
            request.headers[_ADAPTER] = adapter
        request.headers["x-api-key"] = task["key"]

    asked.meta.events.register("before-send.sagemaker-runtime", to_container)
    return asked


def invoke(task: dict[str, Any], component: str, /, **body: Any) -> Any:
    body = {"max_tokens": task["max_tokens"], "temperature": 0, **body}
    named = {"InferenceComponentName": component} if component else {}
    return client(task).invoke_endpoint(
        EndpointName="one", ContentType="application/json", Body=json.dumps(body), **named
    )


def answers(task: dict[str, Any]) -> dict[str, str]:
    def text(component: str, /, **body: Any) -> Any:
        return json.loads(invoke(task, component, **body)["Body"].read())["choices"][0]

    return {
        model: {
            "completions": text(model, prompt=prompt)["text"],
            "chat": text(model, messages=[{"role": "user", "content": prompt}])["message"][
                "content"
            ],
            "model in the body": text("", prompt=prompt, model=model)["text"],
        }
        for model, prompt in task["prompts"].items()
    }


def errors(task: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for what, model in {"unknown model": "unknown", "broken adapter": task["broken"]}.items():
        try:
            invoke(task, model, prompt="t1")
        except botocore.exceptions.ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            found[what] = {"class": type(error).__name__, "status": status}
    return found


main(answers, errors)
