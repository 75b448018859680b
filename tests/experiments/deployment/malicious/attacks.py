"""Replies of a registered node whose operator lies, an attack a round: `FEDCLIP_ATTACKS` is JSON, from rounds to names of attacks."""

import base64
import json
import os
import struct
import time
from pathlib import Path

LATE_SECONDS, PLAN, FOLDER = "FEDCLIP_LATE_SECONDS", "FEDCLIP_ATTACKS", "FEDCLIP_ATTACKS_IN"
GIGABYTES = 4 << 30
UNPACKED = 200 << 20  # as few bytes as an update may have hold no more zeros
seen = {}


def change_messages(module):
    """Let replies be made by the attack of the round."""
    make = module.device_reply

    def device_reply(said, payloads, sign):
        name = json.loads(os.environ[PLAN]).get(str(said["round"]), "honest")
        return ATTACKS[name](json.loads(json.dumps(said)), dict(payloads), sign, make)

    module.device_reply = device_reply


def change_client(module):
    """Remember the layout of the model."""
    begin = module.Client.__init__

    def remember(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        seen["layout"] = self.layout

    module.Client.__init__ = remember


def change_supernode(module):
    """Keep back the objects that are named in a file."""
    push, withheld = module.FleetHttpClient.PushObject, Path(os.environ[FOLDER]) / "withheld"

    def push_object(self, request):
        if withheld.exists() and request.object_id in withheld.read_text():
            return module.PushObjectResponse(stored=True)
        return push(self, request)

    module.FleetHttpClient.PushObject = push_object


def honest(said, payloads, sign, make):
    """Reply as everybody does, and keep the reply for later."""
    content = make(said, payloads, sign)
    config = content.config_records["reply"]
    kept = [config["said"], base64.b64encode(config["signature"]).decode(), base64.b64encode(next(iter(payloads.values()))).decode()]
    _kept().write_text(json.dumps(kept))
    return content


def replay(said, payloads, sign, make):
    """Reply what was kept, byte for byte."""
    text, signature, payload = json.loads(_kept().read_text())
    user, payload = next(iter(payloads)), base64.b64decode(payload)
    content = make(said, {user: payload}, sign)
    content.config_records["reply"]["said"], content.config_records["reply"]["signature"] = text, base64.b64decode(signature)
    return content


def naming(**change):
    """Return an attack that names another run, round, attempt, message or model."""
    return lambda said, payloads, sign, make: make(said | {k: f(said[k]) for k, f in change.items()}, payloads, sign)


def sending(payload):
    """Return an attack that sends another payload, rightly signed."""

    def attack(said, payloads, sign, make):
        from clients.device import digest_of

        sent = {user: payload(honest) for user, honest in payloads.items()}
        users = [of | {"payload": digest_of(sent[of["user"]])} for of in said["users"]]
        return make(said | {"users": users}, sent, sign)

    return attack


def saying(text):
    """Return an attack that says something else, rightly signed."""

    def attack(said, payloads, sign, make):
        content = make(said, payloads, sign)
        content.config_records["reply"]["said"], content.config_records["reply"]["signature"] = text, sign(text.encode())
        return content

    return attack


def another_key(said, payloads, sign, make):
    """Sign with a key that is nobody's."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from clients import signing

    key = ec.generate_private_key(ec.SECP384R1())
    return make(said, payloads, lambda text: signing.sign(key, text))


def swapped(said, payloads, sign, make):
    """Put another update in the place of the one that was signed."""
    return make(said, {user: huge(payload) for user, payload in payloads.items()}, sign)


def other_users(said, payloads, sign, make):
    """Speak for somebody else, too."""
    (user, payload), (own,) = next(iter(payloads.items())), said["users"]
    other = user + 1
    return make(said | {"users": [own, own | {"user": other}]}, {user: payload, other: payload}, sign)


def twice(said, payloads, sign, make):
    """Give the same update twice."""
    return make(said | {"users": said["users"] * 2}, payloads, sign)


def late(said, payloads, sign, make):
    """Reply when the round is over."""
    time.sleep(float(os.environ[LATE_SECONDS]))
    return make(said, payloads, sign)


def withheld(said, payloads, sign, make):
    """Leave out the update, as if it was still on its way."""
    from flwr.app.message.arraychunk import ArrayChunk

    (Path(os.environ[FOLDER]) / "withheld").write_text("\n".join(ArrayChunk(memoryview(p)).object_id for p in payloads.values()))
    return make(said, payloads, sign)


def with_arrays(arrays):
    """Return an attack that sends more arrays than updates, or others."""

    def attack(said, payloads, sign, make):
        content = make(said, payloads, sign)
        for name, array in arrays().items():
            content.array_records["updates"][name] = array
        return content

    return attack


def of_bytes(data):
    """Return an array of the wire format."""
    from flwr.app import Array

    return Array(dtype="uint8", shape=(len(data),), stype="fedclip.bytes", data=data)


def one_piece_time_and_again():
    """Return an array of four gigabytes that is one piece of 100 kilobytes, named 40,000 times: Flower's format has room for it."""
    from flwr.app.message.arraychunk import ArrayChunk

    piece = ArrayChunk(memoryview(bytes(100_000)))
    array = of_bytes(b"")
    array.__dict__["_chunks"] = [(piece.object_id, piece)] * (GIGABYTES // 100_000)
    return {"blob": array}


def one_object():
    """Return an array of 100 megabytes that is not in pieces, as those of Flower's own code are."""
    from flwr.app.message.arraychunk import ArrayChunk

    piece = ArrayChunk(memoryview(os.urandom(100 << 20)))
    array = of_bytes(b"")
    array.__dict__["_chunks"] = [(piece.object_id, piece)]
    return {"blob": array}


def crash(said, payloads, sign, make):
    """Fail."""
    raise RuntimeError("the operator pulled the plug")


def without_records(said, payloads, sign, make):
    """Reply nothing at all."""
    from flwr.app import RecordDict

    return RecordDict({})


def every_value(value):
    """Return the payload of an update whose values are all this one."""
    import torch

    from fedclip.packed import PackedCodec
    from fedclip.update import Dense

    layout = seen["layout"]
    return PackedCodec().encode(Dense(torch.full((layout.size,), value)), layout)


def huge(payload):
    """Return the payload of a huge update."""
    return every_value(1e30)


def another_size(payload):
    """Return the payload of another model."""
    import torch

    from fedclip.layout import Layout
    from fedclip.packed import PackedCodec
    from fedclip.update import Dense

    layout = Layout.of(torch.nn.Linear(7, 7))
    return PackedCodec().encode(Dense(torch.ones(layout.size)), layout)


def bomb(payload, claimed=UNPACKED):
    """Return a packed payload, short enough, header and checksum right, with a frame of 200 MB in it that says it is of `claimed` bytes."""
    import zstandard

    from fedclip import packed_format as packed

    layout = seen["layout"]
    squeeze = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=16)).compressobj(size=UNPACKED)
    block = bytes(1 << 20)
    frame = bytearray(b"".join(squeeze.compress(block) for _ in range(UNPACKED >> 20)) + squeeze.flush())
    descriptor = frame[4]  # RFC 8878, section 3.1.1.1: four bytes say the size
    assert descriptor >> 6 == 2
    at = 5 + (not descriptor >> 5 & 1)
    frame[at : at + 4] = struct.pack("<I", layout.size if claimed is None else claimed)
    body = bytes(_varint(len(frame) * 2 + packed.ZSTD)) + frame
    names = (packed.MAGIC, packed.VERSION, packed.DENSE, packed.FLOATS, 0, layout.size)
    head = packed.HEADER.pack(*names, 0)[:-4]
    return packed.HEADER.pack(*names, packed.checksum(layout, head, body)) + body


def _varint(number):
    while number >= 0x80:
        yield number & 0x7F | 0x80
        number >>= 7
    yield number


def _kept():
    return Path(os.environ[FOLDER]) / "kept.json"


ATTACKS = {
    "honest": honest,
    "withheld": withheld,
    "wrong run": naming(run=lambda run: "another"),
    "wrong round": naming(round=lambda n: n - 1),
    "wrong attempt": naming(attempt=lambda n: n + 1),
    "wrong nonce": naming(nonce=lambda nonce: nonce[::-1]),
    "wrong spec": naming(spec=lambda spec: spec[::-1]),
    "replay": replay,
    "another key": another_key,
    "swapped": swapped,
    "other users": other_users,
    "twice": twice,
    "another size": sending(another_size),
    "truncated": sending(lambda payload: payload[:-10]),
    "bomb": sending(bomb),
    "bomb that lies": sending(lambda payload: bomb(payload, None)),
    "long payload": sending(lambda payload: os.urandom(1 << 20)),
    "one piece time and again": with_arrays(one_piece_time_and_again),
    "oversized": with_arrays(lambda: {"blob": of_bytes(os.urandom(50 << 20))}),
    "one object": with_arrays(one_object),
    "many arrays": with_arrays(lambda: {f"blob {n}": of_bytes(bytes([n % 256, n // 256])) for n in range(500)}),
    "no json": saying("hello"),
    "nested": saying("[" * 100_000),
    "no records": without_records,
    "crash": crash,
    "not a number": sending(lambda payload: every_value(float("nan"))),
    "huge": sending(huge),
    "late": late,
}
