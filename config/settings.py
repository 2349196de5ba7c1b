"""Settings of the example project.  Secrets are in .env, beside this folder."""

import os
from pathlib import Path

from dotenv import load_dotenv

# `salmon start` imports this file itself: it needs the variables of .env here.
load_dotenv(Path(__file__).parent.parent / ".env", interpolate=False)

# Where replies and bounces go out.
relay_config = {"host": "localhost", "port": 8825}

# Where Salmon listens for mail that is not collected.
receiver_config = {"host": "localhost", "port": 8823}

handlers = ["app.handlers.bounces", "app.handlers.orders", "app.handlers.inbox"]

router_defaults = {"host": r"example\.(?:org|com)"}

collection_agents = [
    {
        "name": "isp",
        "protocol": "odmr",
        "server": os.environ.get("ISP_SERVER", "odmr.example.net"),
        "port": int(os.environ.get("ISP_PORT", "366")),
        "ca_file": os.environ.get("ISP_CA_FILE"),
        "account": "acme",
        "password": os.environ["ISP_PASSWORD"],
        "domains": ["example.org", "example.com"],
        "every": 10,
    },
]

smtp_services = {
    "default": {
        "hostname": "mail.example.org",
        "domains": ["example.org", "example.com"],
    },
}
