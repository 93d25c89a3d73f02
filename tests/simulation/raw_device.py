"""A device spoken by hand, message by message, over any link: for those that break the rules."""

from __future__ import annotations

from dataclasses import replace

from websockets.asyncio.client import ClientConnection

from edge_client.identity import Identity
from edge_client.transport import WebSocketLink
from protocol import codec
from protocol.connection import Connection, Role, default_hello
from protocol.link import Link
from protocol.messages import Assignment, Challenge, Hello, Join, Message, Report
from protocol.signing import UNSIGNED, join_statement, report_statement
from protocol.tensors import Payload


class RawDevice:
    """One connection; `send` keeps to the protocol, `force` to nothing."""

    def __init__(self, link: Link, identity: Identity) -> None:
        self.link = link
        self.identity = identity
        self.connection = Connection(Role.DEVICE, default_hello("raw"))

    @classmethod
    def over(cls, socket: ClientConnection, name: str) -> RawDevice:
        """The device of a name over a socket that is open."""
        return cls(WebSocketLink(socket), Identity.named(name))

    async def send(self, message: Message) -> None:
        await self.link.send(self.connection.send(message))

    async def force(self, message: Message) -> None:
        await self.link.send(codec.encode(message))

    async def receive(self) -> Message:
        return self.connection.receive(await self.link.receive())

    async def ask(self, message: Message) -> Message:
        await self.send(message)
        return await self.receive()

    async def challenge(self) -> Challenge:
        assert isinstance(await self.ask(default_hello("raw")), Hello)
        challenge = await self.receive()
        assert isinstance(challenge, Challenge)
        return challenge

    def signed_join(self, challenge: Challenge, token: str = "", federation: str = "sim") -> Join:
        join = Join(federation, self.identity.key, self.link.channel, token, UNSIGNED)
        statement = join_statement(join, challenge.nonce, self.connection.version)
        return replace(join, signature=self.identity.sign(statement))

    async def join(self, token: str = "", federation: str = "sim") -> Message:
        """The answer to an honest join."""
        return await self.ask(self.signed_join(await self.challenge(), token, federation))

    def report(self, asked: Assignment, payload: Payload, examples: int) -> Report:
        """An honest report of an assignment."""
        report = Report(
            asked.assignment, asked.round, asked.base_version, examples, (), payload, UNSIGNED
        )
        return self.signed(report)

    def signed(self, report: Report, federation: str = "sim") -> Report:
        statement = report_statement(report, federation, self.identity.device)
        return replace(report, signature=self.identity.sign(statement))
