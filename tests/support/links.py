"""Links that change the replies of clients."""

from hosl_flower.ledger.ledger import Ledger
from hosl_flower.run import start


def scalars_of(directory):
    return [list(e.scalars) for e in Ledger.read(directory / "ledger.jsonl").entries]


def link_that(monkeypatch, change):
    """In-process links whose clients' replies are changed on their way."""
    original = start.InProcessLink

    class Rogue(original):
        def _deliver(self, requests, until):
            streams = super()._deliver(requests, until)
            return {p: self._changed(p, requests[p], s) for p, s in streams.items()}

        def _changed(self, partition, sent, stream):
            for request, reply in zip(sent, stream, strict=False):
                yield change(partition, request, reply)

    monkeypatch.setattr(start, "InProcessLink", Rogue)
