"""The gateway side of the kernel link: one encrypted connection to each kernel's agent."""

from hub_gateway.link.client import AgentLink
from hub_gateway.link.relay import KernelRelay
from hub_gateway.link.sinks import Sink
from hub_gateway.link.wire import ClientMessage, Dialect, decode

__all__ = ["AgentLink", "ClientMessage", "Dialect", "KernelRelay", "Sink", "decode"]
