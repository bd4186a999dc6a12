"""Count what a server does, in Prometheus' text format."""

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of its own: a process may hold several servers."""

    def __init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        named = {"namespace": "llava_lite", "registry": self.registry}
        self.requests = Counter("requests", "Chat requests by HTTP status; 499: the client left.", ["status"], **named)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts, those of images included.", **named)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers that were sent.", **named)
        self.answers_again = Counter(
            "answers_again",
            "Answers generated again alone, since rounding in a batch might have changed them.",
            **named,
        )
        self.batch_size = Histogram("batch_size", "Sequences of a decode step.", buckets=SIZES, **named)
        timed = {"buckets": SECONDS, **named}
        self.queue_seconds = Histogram("queue_seconds", "From the queue to the model.", **timed)
        self.first_token_seconds = Histogram("first_token_seconds", "From a request to its first text.", **timed)
        self.request_seconds = Histogram("request_seconds", "From a request to its last text.", **timed)
        self._queue = Gauge("queue_length", "Answers that wait for a place in the batch.", **named)
        self._running = Gauge("running", "Answers that are being generated.", **named)

    def watch(self, engine) -> None:
        """Read the lengths of the queue and of the batch from an engine whenever they are asked for."""
        self._queue.set_function(lambda: engine.num_waiting)
        self._running.set_function(lambda: engine.num_running)

    def page(self) -> bytes:
        """Return the text for Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
