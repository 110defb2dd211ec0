import sys

from fedjax_llm.plan import main

sys.exit(main())
