"""Requests at a steady rate, every second one on a connection of its own; what became of them, every second."""

import asyncio
import json
import os
import time
from collections import Counter

import httpx

question, rate = json.loads(os.environ["QUESTION"]), float(os.environ["RATE"])
url, seen, failures, versions = os.environ["SERVICE"] + "/v1/models/coterie:predict", Counter(), Counter(), Counter()


async def one(number, client):
    body = {"instances": [question | {"worker_id": f"annotator-{number % 20 + 1:02d}"}] * 2}
    try:
        answer = await client.post(url, json=body)
        if answer.status_code != 200:
            failures[f"{answer.status_code} {answer.text[:200]}"] += 1
            return
        told = {p["model_version"] for p in answer.json()["predictions"]}
        if len(told) > 1:
            failures["two versions in one answer"] += 1
        versions[told.pop()[:12]] += 1
    except httpx.HTTPError as error:
        failures[f"{type(error).__name__}: {error}"[:200]] += 1
    finally:
        seen["answered"] += 1


async def main():
    began, number, tasks = time.monotonic(), 0, set()
    kept, fresh = ({"limits": httpx.Limits(max_keepalive_connections=most), "timeout": 30} for most in (None, 0))
    async with httpx.AsyncClient(**kept) as keeps, httpx.AsyncClient(**fresh) as connects:
        while True:
            await asyncio.sleep(max(0, began + number / rate - time.monotonic()))
            task = asyncio.create_task(one(number, connects if number % 2 else keeps))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            if number % max(1, int(rate)) == 0:
                told = {"sent": number, "answered": seen["answered"], "rate": number / (time.monotonic() - began)}
                print(json.dumps(told | {"failures": dict(failures), "versions": dict(versions)}), flush=True)


asyncio.run(main())
