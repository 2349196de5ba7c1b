"""An inbound SMTP service: its settings, its policy, and its sessions."""
