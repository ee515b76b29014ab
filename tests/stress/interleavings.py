"""Random interleavings of everything that reads, writes and invalidates, over two hosts and one real Redis.

    python tests/stress/interleavings.py [--runs N] [--seed N] [--json FILE]

Two slabs stand for two hosts, with one or two processes each. Their users look up, compute, store and invalidate;
deferred writes are sent by actors of their own, however late; one reader a host applies the stream. All run one at a
time, switched at every operation on shared memory and every command to Redis (`interleaver`). Some runs add lost
replies, a Redis that loses its data or its stream, processes killed anywhere, leases and lives that end meanwhile.
`coherence_monitor` judges every answer. Exit code 0: no answer was old, or another key's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from coherence_world import World
from provenance import RESULTS, Provenance, at_least, at_most, write_results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "interleavings.json", help="default: %(default)s")
    arguments = parser.parse_args()
    logging.getLogger("llm_edge_cache").setLevel(logging.ERROR)  # that L1 is cleared is part of the runs
    provenance = Provenance(arguments.seed, ("redis",))
    violations: list[str] = []
    with World() as world:
        for number in range(arguments.runs):
            try:
                world.play(number, arguments.seed)
            except AssertionError as error:  # noqa: PERF203 - the next one may find another
                violations.append(str(error))
                print(error)
        counts = world.count()
        print(f"seed {arguments.seed}: {world.steps} steps, {world.answers} answers judged, {world.hits} of them hits")
        print(counts)
        results = {"runs": arguments.runs, "steps": world.steps, "answers": world.answers, "hits": world.hits}
    bars = [
        at_most("answers that were old, or another key's", len(violations), 0),
        at_least("interleavings", arguments.runs, min(arguments.runs, 10_000)),
    ]
    met = write_results(arguments.json, provenance, {**results, "met": counts, "violations": violations}, bars)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
