"""What Flower loads on a client: messages in, `FedSimClient`, replies out, in both of its APIs.

On a real node Flower starts a process for every message. So this module imports what it needs to
tell what is asked for, and torch and the rest only where there is training to do.
"""

from __future__ import annotations

from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.logger import log

from fedsim.core.errors import FedsimError
from fedsim.flower import messages
from fedsim.flower.node import NodeSettings

if TYPE_CHECKING:
    from flwr.client import Client

    from fedsim.flower.client import FedSimClient


class FedSimClientApp(ClientApp):
    """A ClientApp that answers both the Message API and the former client API."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Route a message by the records it carries.

        What this node refuses, or cannot do, comes back as one line, which its log has too.
        """
        try:
            if message.has_content() and messages.is_legacy(message.content):
                return _answer_former(message, context)
            return super().__call__(message, context)
        except FedsimError as error:
            # Flower logs and sends a traceback of what is raised.
            log(ERROR, "fedsim: %s", error)
            failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
            return Message(failure, reply_to=message)


app = FedSimClientApp()


def _client_of(context: Context) -> FedSimClient:
    from fedsim.flower.client import FedSimClient
    from fedsim.flower.run_config import config_from_run_config

    node = NodeSettings.of(context.node_config)
    return FedSimClient(node, config_from_run_config(context.run_config).to_json())


def _answer_former(message: Message, context: Context) -> Message:
    from flwr.client.message_handler.message_handler import handle_legacy_message_from_msgtype

    for asked in messages.Instruction.former(message):
        if asked.records:
            _client_of(context).check_sizes(asked)
    return handle_legacy_message_from_msgtype(_former_client, message, context)


def _former_client(context: Context) -> Client:
    return _client_of(context).to_client()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which partition this node holds, and what data of its own."""
    node, told = NodeSettings.of(context.node_config), None
    if node.data is not None:
        from fedsim.core.own_data import find_own_data

        own = find_own_data(Path(node.data))
        told = (own.samples, own.sha256, own.classes)
    return Message(messages.answer_content(node.partition_id, told), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode a training message, delegate to `FedSimClient.train`, encode the reply."""
    client, asked = _client_of(context), messages.Instruction.of(message)
    client.check_sizes(asked)
    state = asked.state
    arrays, num_examples, metrics = client.train(
        list(state.values()), asked.config, asked.correction
    )
    local = messages.array_record(dict(zip(state, arrays, strict=True)))
    return Message(messages.reply_content(local, num_examples, metrics), reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Decode an evaluation message, delegate to `FedSimClient.evaluate`, encode the reply."""
    client, asked = _client_of(context), messages.Instruction.of(message)
    client.check_sizes(asked)
    loss, num_examples, metrics = client.evaluate(list(asked.state.values()), asked.config)
    content = messages.reply_content(None, num_examples, {"loss": loss, **metrics})
    return Message(content, reply_to=message)
