"""What a cluster gives, known before it is paid for: a probe of one machine, and a discrete-event simulation of the fleet."""
