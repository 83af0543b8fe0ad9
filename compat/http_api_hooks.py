"""What schemathesis cannot know of the HTTP API from its document."""

import schemathesis


@schemathesis.hook
def map_case(context, case):
    """Streams never end, and long waits end too late: watches are long polls, and waits short.

    A lease that ends before its next step is no failure of the server: it lives as long as a run."""
    query = dict(case.query or {})
    if case.operation.path == "/api/v1/leases" and isinstance(case.body, dict):
        ttl = case.body.get("ttl")
        if type(ttl) is int and 0 < ttl < 600:
            case.body = {**case.body, "ttl": 600}
    if case.operation.path == "/api/v1/watch" and case.method.upper() == "GET":
        query["wait"] = "50ms"
        case.query = query
        headers = dict(case.headers or {})
        headers["Accept"] = "application/json"
        case.headers = headers
    elif "wait" in query:
        query["wait"] = "50ms"
        case.query = query
    return case
