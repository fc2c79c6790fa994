// The driver of BullMQ on Node and Redis: one worker in this process, 400 jobs at once.
//
// Run by `benchmarks.systems`; speaks the wire of wire.py. Settings: ioredis (its default client) over a
// unix socket, concurrency 400, finished jobs removed (kept ones would fill Redis's memory). Three steps
// are a flow of three jobs in a line: a parent whose child has a child. Fairness by groups is sold (BullMQ
// Pro), so tenants beside each other share the plain queue.

import { createInterface } from 'node:readline';
import { FlowProducer, Queue, Worker } from 'bullmq';

const PAYLOAD = { customer: 'c-1042', text: 'x'.repeat(193) };
const SLOTS = 400;
const BATCH = 1000;
const SETTLED_MS = 1500;
const PAUSE_MS = 20;
const REMOVED = { removeOnComplete: true };
const QUEUE = 'bench';
// The noisy neighbour, as in wire.py.
const NAP_MS = 20;
const SHARED_SLOTS = 20;
const EVERY_MS = 40;
const RUNS_PER_VISIT = 50;

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const now = () => performance.now() / 1000;

class Bench {
  constructor(path) {
    this.connection = { path, maxRetriesPerRequest: null };
    this.queue = new Queue(QUEUE, { connection: this.connection, defaultJobOptions: REMOVED });
    this.flows = new FlowProducer({ connection: this.connection });
  }

  // Runs a worker for as long as `body` takes; `onStart` is the job's only code.
  async withWorker(onStart, body, slots = SLOTS) {
    const worker = new Worker(QUEUE, async (job) => onStart(now(), job), {
      connection: this.connection,
      concurrency: slots,
      autorun: false,
    });
    const state = { ended: 0 };
    worker.on('completed', () => { state.ended += 1; });
    worker.on('error', (error) => console.error(error));
    await worker.waitUntilReady();
    const running = worker.run();
    try {
      return await body(state);
    } finally {
      await worker.close();
      await running;
    }
  }

  sizes(count) {
    const found = [];
    for (let start = 0; start < count; start += BATCH) found.push(Math.min(BATCH, count - start));
    return found;
  }

  async fill(count) {
    for (const size of this.sizes(count)) {
      await this.queue.addBulk(Array.from({ length: size }, () => ({ name: 'noop', data: PAYLOAD })));
    }
  }

  flow() {
    const job = (name, children) => ({ name, queueName: QUEUE, data: PAYLOAD, opts: REMOVED, children });
    return job('third', [job('second', [job('first', [])])]);
  }

  async drainAll(jobs) {
    let began = 0;
    const onStart = (at) => { began ||= at; };
    return this.withWorker(onStart, async (state) => {
      while (state.ended < jobs) await sleep(2);
      return { took_s: now() - began };
    });
  }

  async submit(count) {
    const took = [];
    await this.queue.add('noop', PAYLOAD);
    for (let n = 0; n < count; n += 1) {
      const began = now();
      await this.queue.add('noop', PAYLOAD);
      took.push(now() - began);
    }
    await this.queue.obliterate({ force: true });
    return { took_s: took };
  }

  async bulk(count) {
    const began = now();
    await this.fill(count);
    const took = now() - began;
    await this.queue.obliterate({ force: true });
    return { took_s: took };
  }

  async drain(count) {
    await this.fill(count);
    return this.drainAll(count);
  }

  async steps(count) {
    for (const size of this.sizes(count)) {
      await this.flows.addBulk(Array.from({ length: size }, () => this.flow()));
    }
    return this.drainAll(3 * count);
  }

  // Drains what A has queued while B comes by: when B's were sent, and from when to when each job's code ran.
  async share(count, visits) {
    const naps = new Map();
    const sent = new Map();
    const nap = async (began, job) => {
      await sleep(NAP_MS);
      naps.set(job.name, [began, now()]);
    };
    let at = 0;
    for (const size of this.sizes(count)) {
      const from = at;
      await this.queue.addBulk(Array.from({ length: size }, (_, n) => ({ name: `a${from + n}`, data: PAYLOAD })));
      at += size;
    }
    return this.withWorker(nap, async (state) => {
      while (!naps.size) await sleep(1);
      const start = now();
      for (let n = 0; n < visits; n += 1) {
        await sleep(Math.max(0, (start - now()) * 1000 + n * EVERY_MS));
        sent.set(`b${n}`, now());
        await this.queue.add(`b${n}`, PAYLOAD);
      }
      while (state.ended < count + visits) await sleep(2);
      return { naps, sent };
    }, SHARED_SLOTS);
  }

  async noisy(count) {
    const span = ({ naps }) => {
      const ofA = [...naps].filter(([name]) => name.startsWith('a')).map(([, times]) => times);
      return Math.max(...ofA.map(([, end]) => end)) - Math.min(...ofA.map(([start]) => start));
    };
    await this.share(Math.max(1, Math.floor(count / 10)), 0);
    const beside = await this.share(count, Math.max(2, Math.floor(count / RUNS_PER_VISIT)));
    const alone = await this.share(count, 0);
    const took = [...beside.sent].map(([name, at]) => beside.naps.get(name)[0] - at);
    return { took_s: took, beside_s: span(beside), alone_s: span(alone) };
  }

  async idle(count) {
    const took = [];
    let reached = () => {};
    return this.withWorker((at) => reached(at), async (state) => {
      await sleep(SETTLED_MS);
      for (let n = 0; n < count; n += 1) {
        const started = new Promise((done) => { reached = done; });
        const began = now();
        await this.queue.add('mark', PAYLOAD);
        took.push((await started) - began);
        await sleep(PAUSE_MS);
      }
      while (state.ended < count) await sleep(2);
      return { took_s: took };
    });
  }
}

let bench;
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  if (bench === undefined) {
    bench = new Bench(order.redis);
    await bench.queue.waitUntilReady();
    process.stdout.write('{"ready":true}\n');
  } else {
    process.stdout.write(`${JSON.stringify(await bench[order.do](order.count))}\n`);
  }
}
process.exit(0);
