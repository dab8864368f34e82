"""A Grid without a network, for tests: real Messages, real ClientApp handlers."""

import threading
from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict

from hosl_flower.flower import client_app
from hosl_flower.flower.message_link import EXCHANGE
from hosl_flower.flower.stream.calls import SESSION


class LocalGrid:
    """SuperNodes are function calls."""

    def __init__(self, nodes):
        self.nodes = nodes  # node id -> node config, or None for a node that never answers
        self.answers = {}
        self.activated = "at first"
        self.sent = []

    def get_node_ids(self):
        return list(self.nodes)

    def get_nodes(self):
        return [SimpleNamespace(node_id=n, last_activated_at=self.activated) for n in self.nodes]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self.nodes:
                ids.append("")  # Flower takes no message for a node that is gone
                continue
            config = self.nodes[message.metadata.dst_node_id]
            message.metadata._message_id = f"m{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            if config is not None:
                self.answers[ids[-1]] = self.answer(message, config)
        return ids

    def answer(self, message, config):
        context = Context(1, message.metadata.dst_node_id, config, RecordDict(), {})
        if config.get("crash"):
            return Message(Error(code=2, reason="out of memory"), reply_to=message)
        if message.metadata.message_type == EXCHANGE:
            return client_app.exchange(message, context)
        return client_app.node(message, context)

    def pull_messages(self, ids):
        return [self.answers.pop(i) for i in ids if i in self.answers]


class ThreadGrid(LocalGrid):
    """Sessions run in threads, as ClientApps run in processes."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.threads = []

    def push_messages(self, messages):
        ids = []
        for message in messages:
            config = self.nodes.get(message.metadata.dst_node_id)
            if message.metadata.message_type != SESSION or config is None:
                ids += super().push_messages([message])
                continue
            message.metadata._message_id = f"m{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            self.threads.append(threading.Thread(target=self.run, args=(message, config)))
            self.threads[-1].start()
        return ids

    def run(self, message, config):
        context = Context(1, message.metadata.dst_node_id, config, RecordDict(), {})
        self.answers[message.metadata.message_id] = client_app.session(message, context)
