REGISTERS: dict[str, int] = {}
