"""Does an export that another program serves answer as the run's own model does? Both greedily, letter by letter.

    tasft export runs/demo models/demo --gguf
    llama-server -m models/demo/demo.gguf --port 8080 --parallel 8
    python research/served.py runs/demo http://localhost:8080/v1 --by llama.cpp --json docs/results/served.json

Replies are counted, and not kept.
"""

import argparse
from pathlib import Path
from typing import Any

from tasft.core.provenance import commit, read_json, write_json
from tasft.models.engine import Reply, Request, Sampling, replies_in
from tasft.models.server import ServerEngine
from tasft.models.server_settings import Server
from tasft.run import recipe_file

BEGINNING = 20  # Letters.


def compared(ours: list[Reply], engine: ServerEngine, longest: int) -> dict[str, int]:
    """How many replies are the same to the letter, and how many begin alike."""
    asked = [Request(reply.id, reply.prompt) for reply in ours]
    served = {reply.id: reply for batch in engine.generate(asked, Sampling(longest), "served") for reply in batch}
    pairs = [(reply.completion.strip(), served[reply.id].completion.strip()) for reply in ours]
    return {
        "replies": len(pairs),
        "same": sum(mine == its for mine, its in pairs),
        "begin_alike": sum(mine[:BEGINNING] == its[:BEGINNING] for mine, its in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("url")
    parser.add_argument("--by", required=True, help="What serves it, with its version.")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    recipe = recipe_file.load(str(asked.run / "recipe.yaml"))
    engine = ServerEngine(Server(urls=[asked.url], model=asked.run.name, concurrency=8))
    sets: dict[str, Any] = {}
    for name in recipe.evaluate.sets:
        ours = list(replies_in(asked.run / "evaluate" / "final" / name / "replies.jsonl", name).values())
        sets[name] = compared(ours, engine, recipe.evaluate.max_new_tokens)
    trained_at = read_json(asked.run / "manifest.json")["commit"]
    write_json(asked.json, {"by": asked.by, "commit": commit(), "trained_at": trained_at, "sets": sets})


if __name__ == "__main__":
    main()
