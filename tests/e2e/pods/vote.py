"""Votes of a stranger, and what they are scored by until these are in their profile."""

import json
import os
import time

import httpx

question = json.loads(os.environ["QUESTION"])
with httpx.Client(base_url=os.environ["SERVICE"], timeout=30) as client:

    def ask():
        body = {"instances": [question | {"worker_id": "e2e-voter"}]}
        return client.post("/v1/models/coterie:predict", json=body).json()["predictions"][0]

    before = ask()
    votes = [
        {
            "worker_id": "e2e-voter",
            "prompt": f"{question['prompt']} ({i})",
            "chosen": f"Write {i} lists!",
            "rejected": f"Perhaps {i} lists are what one might write.",
        }
        for i in range(int(os.environ["VOTES"]))
    ]
    answer = client.post("/v1/feedback", json={"comparisons": votes})
    assert answer.status_code == 200, answer.text
    after, until = before, time.monotonic() + 60
    while after["source"] == "global" and time.monotonic() < until:
        time.sleep(1)
        after = ask()
print(
    json.dumps({"outcomes": [one["status"] for one in answer.json()["comparisons"]], "before": before, "after": after})
)
