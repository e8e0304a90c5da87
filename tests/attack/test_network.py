"""Random strangers, and random damage to what ranks say, at rank 0's port; seeded."""

import random
import socket
from contextlib import suppress

import pytest

from megatron_ext.runtime.channel import Message, Reception
from tests.runtime.test_channel import RUN, SECRET, said

pytestmark = pytest.mark.slow

CONVERSATION: list[Message] = [{"beat": 0}, {"failure": {"text": "x" * 50, "status": 1}}, {"beat": 0}, {"bye": 0}]


def damaged(lines: list[bytes], choice: random.Random) -> bytes:
    """A rank's lines with something changed, left out, said twice, or in another order."""
    text = bytearray(b"".join(lines))
    match choice.randrange(7):
        case 0:
            text[choice.randrange(len(text))] ^= 1 << choice.randrange(8)
        case 1:
            del text[choice.randrange(len(text)) :]
        case 2:
            del text[: choice.randrange(len(text))]
        case 3:
            place = choice.randrange(len(text))
            text[place:place] = choice.randbytes(choice.randrange(1, 300))
        case 4:
            return b"".join(choice.choices(lines, k=6))
        case 5:
            return b"".join(choice.sample(lines, len(lines)))
        case 6:
            return choice.randbytes(choice.randrange(2000))
    return bytes(text)


@pytest.mark.parametrize("seed", range(8))
def test_of_a_damaged_conversation_only_whole_messages_count_once_and_in_order(seed: int) -> None:
    choice = random.Random(seed)
    for _ in range(500):
        reception = Reception("127.0.0.1", SECRET, run=RUN, world_size=3)
        whole = said(2, *CONVERSATION)
        heard: list[tuple[int, Message | None]] = []
        with socket.create_connection(("127.0.0.1", reception.port)) as caller, suppress(ConnectionError):
            caller.sendall(damaged(whole, choice))
            caller.shutdown(socket.SHUT_WR)
            while (new := reception.hear(0.01)) or not heard:
                heard += new or [(0, None)]
        reception.close()
        numbers = [message["number"] for rank, message in heard if message is not None and rank == 2]
        assert {rank for rank, _ in heard} <= {0, 2}
        assert numbers == sorted(set(numbers))
        expected: list[Message] = [{"rank": 2}, *CONVERSATION]
        for _, message in heard:
            if message is not None:
                assert {key: message[key] for key in message if key != "number"} == expected[message["number"] - 1]
