"""
A queue in which clients take turns, so that one of them cannot make all others wait.

Each client has a line of its own, in order of arrival. The next request is from the client that
holds the fewest rows; among equals, from the one whose turn was longest ago. This is max-min
fairness by counting (fair queuing: Nagle, RFC 970; Demers et al., SIGCOMM 1989).
"""

from collections import Counter, deque


class FairQueue:
    """
    Requests that wait, in a line for each client. A request needs the attributes `client`, any
    hashable value, and `cancelled`.
    """

    def __init__(self):
        # client -> its requests; none is empty. The client whose turn was longest ago comes first
        self.lines = {}

    def __len__(self):
        return sum(map(len, self.lines.values()))

    def __iter__(self):
        """All requests, client by client."""
        for line in self.lines.values():
            yield from line

    def append(self, request):
        """Add a request at the end of its client's line."""
        self.lines.setdefault(request.client, deque()).append(request)

    def extend(self, requests):
        for request in requests:
            self.append(request)

    def put_back(self, request):
        """Add a request at the front of its client's line, and give the client the next turn."""
        line = self.lines.pop(request.client, deque())
        line.appendleft(request)
        self.lines = {request.client: line, **self.lines}

    def peek(self, num_rows):
        """The next request. num_rows: client -> rows that it holds, a Counter."""
        # min returns the first of several equal ones
        client = min(self.lines, key=num_rows.__getitem__)
        return self.lines[client][0]

    def pop(self, num_rows):
        """Remove and return the next request. Its client goes to the end of the turns."""
        request = self.peek(num_rows)
        line = self.lines.pop(request.client)
        line.popleft()
        if line:
            self.lines[request.client] = line
        return request

    def drop_cancelled(self):
        lines = {}
        for client, line in self.lines.items():
            stay = deque(request for request in line if not request.cancelled)
            if stay:
                lines[client] = stay
        self.lines = lines

    def clear(self):
        self.lines.clear()

    def num_by_client(self):
        """Requests that each client has waiting, a Counter."""
        return Counter({client: len(line) for client, line in self.lines.items()})
