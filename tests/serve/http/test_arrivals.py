"""Taking connections: all that wait, in few turns of the event loop, since a turn may hold an execution."""

import asyncio
import contextlib
import socket

import uvloop

from lepton_xla.serve.http.arrivals import Listener
from lepton_xla.serve.http.listening import Listening
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.limits import Limits

COUNT = 40


def test_connections_that_wait_are_taken_in_few_turns():
    async def turns_taken():
        state = ServerState(lambda exchange: None, Limits())
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        listener = Listener(state, Listening([listener]), COUNT, {})
        listener.open()
        with contextlib.ExitStack() as stack:
            for _ in range(COUNT):
                stack.enter_context(socket.create_connection(address))
            turns = 0
            while len(state.connections) < COUNT:
                turns += 1
                await asyncio.sleep(0)
            await listener.close()
        return turns

    assert uvloop.run(turns_taken()) < 10
