"""The thread that decodes for a server: whatever fails on it, nobody waits for ever."""

import asyncio
import sys
from pathlib import Path

from lepton_xla.generation import Engine, Sampling
from lepton_xla.serve.batching.decoding import Decoding

sys.path.insert(0, str(Path(__file__).parents[2] / "generation"))

from test_slots import Hashing


def test_a_fault_of_an_order_ends_what_runs_and_the_next_ones_go_on(monkeypatch):
    engine = Engine(Hashing())
    sampling = Sampling(max_tokens=3, ignore_end=True)

    def fail(sequence):
        raise ZeroDivisionError("a fault of ours")

    async def finish_of(decoding, prompt):
        sequence, ended = engine.sequence(prompt, sampling), asyncio.get_running_loop().create_future()
        sequence.told = lambda each, token, text: ended.set_result(each.finish) if token is None else None
        decoding.submit(sequence)
        return await asyncio.wait_for(ended, 20)

    async def main():
        decoding = Decoding(engine, 10)
        assert await finish_of(decoding, [1, 2]) == "length"
        with monkeypatch.context() as patch:
            patch.setattr(engine, "cancel", fail)
            decoding.cancel(engine.sequence([1], sampling))
            assert await finish_of(decoding, [3]) in ("length", "failed")
        assert await finish_of(decoding, [1, 2]) == "length"

    asyncio.run(main())
