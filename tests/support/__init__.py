"""What several test modules share and no fixture can hold: types, programs, and readers of results."""
