"""Scores for a known, a new and an unknown worker, and a bad request, over REST and gRPC."""

import asyncio
import json
import os
import time

import httpx
from kserve import InferenceGRPCClient, InferInput, InferRequest

question, said = json.loads(os.environ["QUESTION"]), {}
with httpx.Client(base_url=os.environ["SERVICE"], timeout=30) as client:

    def ask(worker, **more):
        body = {"instances": [question | {"worker_id": worker} | more]}
        answer = client.post("/v1/models/coterie:predict", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"][0]

    def known(worker):
        """A lookup that missed its deadline fell back; what it found serves the next question."""
        for _ in range(10):
            told = ask(worker)
            if told["reason"] != "profiles-unavailable":
                break
            time.sleep(0.5)
        return told

    said["known"] = [known(f"annotator-{i:02d}") for i in range(1, 21)]
    said["unknown"] = ask("nobody-knows-me")
    first, second = question["responses"]
    vote = {"prompt": question["prompt"], "chosen": second, "rejected": first}
    said["new"] = ask("somebody-new", comparisons=[vote] * 3)
    refused = client.post("/v1/models/coterie:predict", json={"instances": [{"prompt": "p"}]})
    said["refused"] = [refused.status_code, refused.json()]

    texts = {"worker_id": ["annotator-01"], "prompt": [question["prompt"]], "response": question["responses"]}
    inputs = [InferInput(name, [len(values)], "BYTES", data=values) for name, values in texts.items()]
    request = InferRequest("coterie", inputs)

    async def infer():
        async with InferenceGRPCClient(os.environ["GRPC"]) as grpc:
            return await grpc.infer(request)

    answer = asyncio.run(infer())
    said["grpc"] = next(o for o in answer.outputs if o.name == "score").as_numpy().tolist()
print(json.dumps(said))
