"""Everything durable: the ledger, parts, snapshots, and reading them back."""
