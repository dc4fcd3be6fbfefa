"""The control plane between workers and coordinator: messages, sockets, and who may join. No torch."""
