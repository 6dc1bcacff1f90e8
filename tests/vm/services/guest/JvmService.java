import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.lang.management.GarbageCollectorMXBean;
import java.lang.management.ManagementFactory;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.LongStream;

/**
 * A service on a JVM: threads that compute, threads that make garbage, timers, a heap full of data.
 *
 * <p>Its clients send one word a line; each answer is one line of NAME=VALUE words.
 */
public final class JvmService {
	static final int PORT = 7002;
	static final int CHAINS = 4;
	static final int GARBAGE = 2;
	static final int BLOCKS = 64;
	static final int WORDS = 1 << 17; // of a block: 1 MiB
	static final int ENTRIES = 50_000;
	static final int STEPS = 20_000; // of a chain, between two rests

	static final long[][] blocks = new long[BLOCKS][];
	static final Map<String, String> entries = new HashMap<>();
	static final List<Chain> chains = new ArrayList<>();
	static final AtomicLong lists = new AtomicLong();
	static final AtomicLong wrong = new AtomicLong();
	static final AtomicLong ticks = new AtomicLong();

	/** What the chains are made of: hot, so compiled. */
	static long mix(long x) {
		x = (x ^ (x >>> 30)) * 0xbf58476d1ce4e5b9L;
		x = (x ^ (x >>> 27)) * 0x94d049bb133111ebL;
		return (x ^ (x >>> 31)) + 0x9e3779b97f4a7c15L;
	}

	/** Nobody calls this before a client says "compile". */
	static long cold(long x) {
		long sum = 0;
		for (int i = 0; i < 100; i++)
			sum += Long.rotateLeft(x * 31 + i, i & 63);
		return sum;
	}

	static final class Chain extends Thread {
		final int number;
		private long value;
		private long length;

		Chain(int number) {
			super("chain " + number);
			this.number = number;
			value = number;
		}

		@Override
		public void run() {
			for (;;) {
				synchronized (this) {
					for (int i = 0; i < STEPS; i++)
						value = mix(value);
					length += STEPS;
				}
				rest(20);
			}
		}

		/** Computes the chain again from its start. */
		synchronized boolean right() {
			long again = number;
			for (long i = 0; i < length; i++)
				again = mix(again);
			return again == value;
		}

		synchronized String state() {
			return length + ":" + Long.toHexString(value);
		}
	}

	/** Makes lists, looks at them, and forgets them. */
	static void makeGarbage() {
		for (;;) {
			List<String> list = new LinkedList<>();
			for (int i = 0; i < 5000; i++)
				list.add("element " + i);
			int at = 0;
			for (String element : list)
				if (!element.equals("element " + at++))
					wrong.incrementAndGet();
			lists.incrementAndGet();
			rest(20);
		}
	}

	static void rest(long milliseconds) {
		try {
			Thread.sleep(milliseconds);
		} catch (InterruptedException e) {
			throw new IllegalStateException(e);
		}
	}

	static void fill() {
		for (int b = 0; b < BLOCKS; b++) {
			blocks[b] = new long[WORDS];
			for (int w = 0; w < WORDS; w++)
				blocks[b][w] = mix((long) b * WORDS + w);
		}
		for (int i = 0; i < ENTRIES; i++)
			entries.put("key " + i, "value " + mix(i));
	}

	static String state() {
		StringBuilder text = new StringBuilder("pid=" + ProcessHandle.current().pid());
		int alive = 0;
		for (Chain chain : chains) {
			text.append(" chain").append(chain.number).append('=').append(chain.state());
			alive += chain.isAlive() ? 1 : 0;
		}
		return text + " alive=" + alive + " lists=" + lists + " wrong=" + wrong + " ticks=" + ticks;
	}

	static String memory() {
		long bad = 0;
		for (int b = 0; b < BLOCKS; b++)
			for (int w = 0; w < WORDS; w++)
				bad += blocks[b][w] == mix((long) b * WORDS + w) ? 0 : 1;
		for (int i = 0; i < ENTRIES; i++)
			bad += entries.get("key " + i).equals("value " + mix(i)) ? 0 : 1;
		int right = 0;
		for (Chain chain : chains)
			right += chain.right() ? 1 : 0;
		return "words=" + (long) BLOCKS * WORDS + " entries=" + entries.size() + " bad=" + bad
				+ " chains=" + right;
	}

	static String gc() {
		long before = collections();
		System.gc();
		return "collections=" + collections() + " more=" + (collections() - before);
	}

	static long collections() {
		long count = 0;
		for (GarbageCollectorMXBean bean : ManagementFactory.getGarbageCollectorMXBeans())
			count += bean.getCollectionCount();
		return count;
	}

	/** Runs what was never run, until it is compiled, and compares. */
	static String compile() {
		long first = cold(12345);
		long before = ManagementFactory.getCompilationMXBean().getTotalCompilationTime();
		long different = 0;
		for (int i = 0; i < 100_000; i++)
			different += cold(12345) == first ? 0 : 1;
		long after = ManagementFactory.getCompilationMXBean().getTotalCompilationTime();
		return "first=" + first + " different=" + different + " compiled=" + (after > before);
	}

	static String threads() throws InterruptedException {
		AtomicLong sum = new AtomicLong();
		CountDownLatch done = new CountDownLatch(8);
		for (int t = 0; t < 8; t++) {
			int first = 1000 * t;
			new Thread(() -> {
				for (int i = first; i < first + 1000; i++)
					sum.addAndGet(i);
				done.countDown();
			}).start();
		}
		boolean all = done.await(60, TimeUnit.SECONDS);
		long parallel = LongStream.range(0, 100_000).parallel().sum();
		return "all=" + all + " sum=" + sum + " parallel=" + parallel;
	}

	static String child() throws IOException, InterruptedException {
		Process child = new ProcessBuilder("echo", "499500").start();
		try (BufferedReader out = new BufferedReader(new InputStreamReader(child.getInputStream()))) {
			return "printed=" + out.readLine() + " status=" + child.waitFor();
		}
	}

	static String answer(String word) throws IOException, InterruptedException {
		switch (word) {
			case "state": return state();
			case "memory": return memory();
			case "gc": return gc();
			case "compile": return compile();
			case "threads": return threads();
			case "child": return child();
			default: return "unknown=" + word;
		}
	}

	static void serve(Socket client) {
		try (client;
				BufferedReader in = new BufferedReader(new InputStreamReader(client.getInputStream()));
				PrintStream out = new PrintStream(client.getOutputStream(), true)) {
			for (String line = in.readLine(); line != null; line = in.readLine())
				out.println(answer(line));
		} catch (IOException | InterruptedException e) {
			e.printStackTrace();
		}
	}

	public static void main(String[] arguments) throws IOException {
		fill();
		for (int number = 0; number < CHAINS; number++)
			chains.add(new Chain(number));
		chains.forEach(Thread::start);
		for (int number = 0; number < GARBAGE; number++)
			new Thread(JvmService::makeGarbage, "garbage " + number).start();
		ScheduledExecutorService timer = Executors.newScheduledThreadPool(1);
		timer.scheduleAtFixedRate(ticks::incrementAndGet, 0, 50, TimeUnit.MILLISECONDS);
		try (ServerSocket server = new ServerSocket(PORT, 16, InetAddress.getByName("127.0.0.1"))) {
			for (;;) {
				Socket client = server.accept();
				new Thread(() -> serve(client)).start();
			}
		}
	}
}
