"""F7: `python -m splitdecode` is the `splitdecode` command."""

from __future__ import annotations

from splitdecode.cli import main

raise SystemExit(main())
