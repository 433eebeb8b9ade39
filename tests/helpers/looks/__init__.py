"""How figures and pages look: their colours, their marks, and what a browser makes of them."""
