"""The short form of `chaos.py`, and that it finds what it is there to find."""

import asyncio
import collections
import random

import chaos
import pytest


@pytest.mark.parametrize(("clients", "requests"), [(300, 5000), pytest.param(1200, 20_000, marks=pytest.mark.slow)])
def test_after_a_storm_of_bad_clients_health_and_answers_are_right_and_memory_is_what_it_was(clients, requests):
    assert chaos.run(clients, seed=0, endurance_requests=requests) == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "status 500"),
        (b'HTTP/1.1 400 Bad\r\nContent-Length: 30\r\n\r\nFile "/srv/lepton_xla/app.py"', "tells of the inside"),
    ],
)
def test_a_server_that_fails_or_talks_is_found_out(answer, said):
    async def main():
        async def careless(reader, writer):
            await reader.read(100)
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(careless, "127.0.0.1", 0)
        found = collections.Counter()
        async with server:
            port = server.sockets[0].getsockname()[1]
            await chaos.act(port, chaos.nonsense, random.Random(1), found)
        return found

    (what,) = (what for what in asyncio.run(main()) if what.startswith("!"))
    assert said in what
