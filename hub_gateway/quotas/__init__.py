"""Who may hold how much: policies, admission, the queue, the ledger and its reports."""
