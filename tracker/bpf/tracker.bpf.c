// SPDX-License-Identifier: GPL-2.0 OR MIT
//
// Dual MIT/GPL. Marks every block of one volume that is written, discarded or zeroed, once when
// the bio is queued and once when it has completed, and counts the sectors of both.
//
// - A mark is complete before it is counted: who sees equal counts, and scans after that, sees
//   the mark of every write that had completed.
// - The mark at completion is the one that loses nothing: the data is on the disk by then. The
//   mark at queue tells a reader that the block may change under it.
// - A completion that no program saw is made up for: what was issued is remembered until it is
//   seen to complete. When its request is issued again, or the audit finds it with nothing in
//   flight, it is marked and counted then.
// - Each volume has programs of its own; all configuration is constant. There are COPIES of every
//   program with counters of their own: the kernel skips a program that is interrupted by its own
//   event, but not the other copy.
//
// Needs no headers: types are matched by BTF (CO-RE).

typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static __attribute__((always_inline)) inline
// An atomic operation that fetches is a full barrier on every architecture, one that does not is
// none; the compiler drops the fetch of a value that nobody uses.
#define FETCHED(operation) ({ u64 old = (operation); asm volatile("" : : "r"(old)); })
#define CORE __attribute__((preserve_access_index))
#define __uint(name, value) int (*name)[value]
#define __type(name, type) typeof(type) *name
#define __array(name, type) typeof(type) *name[]

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*bpf_loop)(u32 count, void *callback, void *context, u64 flags) = (void *)181;

// The fields of the kernel that are used; their places come from the running kernel's BTF.
struct gendisk { int major; int first_minor; } CORE;
struct block_device { struct gendisk *bd_disk; } CORE;
struct bvec_iter { u64 bi_sector; u32 bi_size; } CORE;
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	struct bvec_iter bi_iter;
	void *bi_private;
} CORE;
struct request_queue { struct gendisk *disk; } CORE;
struct blk_mq_hw_ctx { u32 queue_num; } CORE;
struct request {
	struct request_queue *q;
	struct blk_mq_hw_ctx *mq_hctx;
	u32 cmd_flags;
	int tag, internal_tag;
	u32 __data_len;
	u64 __sector;
	struct bio *bio;
} CORE;

enum {
	OP_MASK = 0xff,
	OP_WRITE_BIT = 1, // as the kernel's op_is_write()
	OP_DISCARD = 3,
	OP_WRITE_ZEROES = 9,
	OP_DRV_OUT = 35,

	MAP_HASH = 1,
	MAP_ARRAY = 2,
	MAP_ARRAY_OF_MAPS = 12,
	MMAPABLE = 1 << 10,
	INNER_MAP = 1 << 12, // may be replaced by one of another size

	SECTOR_SHIFT = 9,
	WORD_SHIFT = 6, // blocks in a leaf word
	GROUP_SHIFT = 6, // leaf words in a bit of the summary
	DISCARD_BIOS_MAX = 256, // ranges in one discard request; NVMe allows no more
	STASH_ENTRIES = 16384,
};

// Counters; each copy has a row of COUNTERS.
enum {
	C_QUEUED, // sectors of writes
	C_QUEUED_DISCARD,
	C_DONE, // sectors that completed and that the kernel counts as written
	C_DONE_DISCARD,
	C_FAILED, // sectors that ended before they became a request
	C_FAILED_DISCARD,
	C_DOUBT_OPAQUE, // passthrough writes: no one knows which blocks
	C_DOUBT_RANGES, // a discard of too many ranges
	C_DOUBT_STASH, // the extent of a bio was not remembered
	COUNTERS = 16,
	COPIES = 2,
};

volatile const u32 cfg_major = 0, cfg_minor = 0; // of the whole disk
volatile const u64 cfg_first = 0; // where the volume starts on it, sectors
volatile const u32 cfg_block_shift = 12;
volatile const u32 cfg_bio_based = 0; // completes bios, not requests
volatile const u32 cfg_uncounted_zeroes = 0; // the driver (zram) counts no discards, nor zeroes as writes
volatile const u32 cfg_depth = 0; // requests of one hardware queue that are remembered
volatile const u32 cfg_completion_marks = 1; // 0 only in a test that shows what they are for

#define ARRAY(name, entries) \
	struct { \
		__uint(type, MAP_ARRAY); __uint(map_flags, MMAPABLE); __uint(max_entries, entries); \
		__type(key, u32); __type(value, u64); \
	} name SEC(".maps")

ARRAY(header, 64);
ARRAY(counters, COUNTERS * COPIES);

// Of the header: sectors of the volume. What lies beyond is no block of it, or not yet.
enum { H_SECTORS = 5 };

// The bitmaps that count. User space puts larger ones there when the volume has grown; the call
// that does so returns when no program that looked before still runs.
enum { LIVE, SUMMARY, BITMAPS };
struct bitmap {
	__uint(type, MAP_ARRAY); __uint(map_flags, MMAPABLE | INNER_MAP); __uint(max_entries, 1);
	__type(key, u32); __type(value, u64);
};
struct {
	__uint(type, MAP_ARRAY_OF_MAPS); __uint(max_entries, BITMAPS);
	__type(key, u32); __type(value, u32);
	__array(values, struct bitmap);
} bitmaps SEC(".maps");

// A bio that is split on its way completes with the extent of its last piece: remember the whole.
struct extent { u64 sector; u64 bytes; };
struct {
	__uint(type, MAP_HASH); __uint(max_entries, STASH_ENTRIES);
	__type(key, u64); __type(value, struct extent);
} stash SEC(".maps");

// A request that was issued, until each copy has seen it complete. User space settles a slot as
// settle() does.
struct slot {
	u64 sector;
	u32 bytes, op;
	u64 left[COPIES]; // sectors
};
struct {
	__uint(type, MAP_ARRAY); __uint(map_flags, MMAPABLE); __uint(max_entries, 1);
	__type(key, u32); __type(value, struct slot);
} slots SEC(".maps");

INLINE void count(u32 copy, u32 counter, u64 n)
{
	u32 key = copy * COUNTERS + counter;
	u64 *value = bpf_map_lookup_elem(&counters, &key);

	// A full barrier (see FETCHED): the mark comes before it is counted.
	if (value)
		FETCHED(__sync_fetch_and_add(value, n));
}

INLINE u64 *word_of(u32 bitmap, u32 word)
{
	void *words = bpf_map_lookup_elem(&bitmaps, &bitmap);

	return words ? bpf_map_lookup_elem(words, &word) : 0;
}

INLINE void mark_word(u32 word, u64 mask)
{
	u64 *leaf = word_of(LIVE, word), *sum;
	u32 group = word >> GROUP_SHIFT;
	u64 bit = 1ULL << (group & 63);

	// Beyond the bitmaps only while the volume grows: all of that part is dirty anyway.
	if (!leaf)
		return;
	// Leaf, full barrier (the fetch), summary: the partner of take_group() in user space. Never
	// a plain look instead: the bit could be taken, and the disk read, before our data is seen.
	FETCHED(__sync_fetch_and_or(leaf, mask));
	sum = word_of(SUMMARY, group >> WORD_SHIFT);
	if (sum && !(*(volatile u64 *)sum & bit))
		FETCHED(__sync_fetch_and_or(sum, bit));
}

static long fill_word(u32 i, u32 *first)
{
	mark_word(*first + i, ~0ULL);
	return 0;
}

// Marks the blocks of a range of the disk that lie in the volume. A write beside a partition is
// somebody else's; one behind a whole disk's known end tells that it has grown, which its size
// tells as well.
INLINE void mark(u64 sector, u64 bytes)
{
	u64 end = sector + ((bytes + 511) >> SECTOR_SHIFT), stop;
	u32 shift = cfg_block_shift - SECTOR_SHIFT, key = H_SECTORS, first_word, last_word;
	u64 *sectors = bpf_map_lookup_elem(&header, &key);
	u64 first, last, head, tail;

	if (!bytes || !sectors)
		return;
	stop = cfg_first + *(volatile u64 *)sectors;
	if (end > stop)
		end = stop;
	if (sector < cfg_first)
		sector = cfg_first;
	if (sector >= end)
		return;
	first = (sector - cfg_first) >> shift;
	last = (end - cfg_first - 1) >> shift;
	first_word = first >> WORD_SHIFT;
	last_word = last >> WORD_SHIFT;
	head = ~0ULL << (first & 63);
	tail = ~0ULL >> (63 - (last & 63));
	if (first_word == last_word) {
		mark_word(first_word, head & tail);
		return;
	}
	mark_word(first_word, head);
	if (last_word - first_word > 1) {
		u32 from = first_word + 1;

		bpf_loop(last_word - first_word - 1, fill_word, &from, 0);
	}
	mark_word(last_word, tail);
}

// What is counted with the discards and not with the writes.
INLINE int with_discards(u32 op)
{
	return op == OP_DISCARD || (cfg_uncounted_zeroes && op == OP_WRITE_ZEROES);
}

INLINE int is_ours(struct gendisk *disk)
{
	return disk->first_minor == cfg_minor && disk->major == cfg_major;
}

struct walk { struct bio *bio; };

// Marks one bio of a list. A pointer that has been stored is a number to the verifier: read by it.
static long mark_bio(u32 i, struct walk *walk)
{
	struct bio *bio = walk->bio, *next = 0;
	u64 sector = 0;
	u32 bytes = 0;

	bpf_probe_read_kernel(&sector, sizeof(sector), &bio->bi_iter.bi_sector);
	bpf_probe_read_kernel(&bytes, sizeof(bytes), &bio->bi_iter.bi_size);
	bpf_probe_read_kernel(&next, sizeof(next), &bio->bi_next);
	mark(sector, bytes);
	walk->bio = next;
	return !next;
}

// Requests are allocated once, with a number in the queue of their scheduler, or else of their
// driver.
INLINE struct slot *slot_of(struct request *rq)
{
	int number = rq->internal_tag;
	u32 key;

	if (number < 0)
		number = rq->tag;
	if (number < 0 || (u32)number >= cfg_depth)
		return 0;
	key = rq->mq_hctx->queue_num * cfg_depth + number;
	return bpf_map_lookup_elem(&slots, &key);
}

// What the slot still holds completed unseen: marked and counted now, whoever takes it out first.
INLINE void settle(struct slot *slot, u32 copy)
{
	u64 left = __sync_lock_test_and_set(&slot->left[copy], 0);

	if (!left)
		return;
	mark(slot->sector, slot->bytes);
	count(copy, with_discards(slot->op) ? C_DONE_DISCARD : C_DONE, left);
}

INLINE int on_issue(struct request *rq)
{
	u32 op = rq->cmd_flags & OP_MASK, bytes = rq->__data_len;
	struct bio *bio = rq->bio;
	struct slot *slot;

	if (!(op & OP_WRITE_BIT) || !is_ours(rq->q->disk))
		return 0;
	slot = slot_of(rq);
	if (!slot)
		return 0;
	settle(slot, 0);
	settle(slot, 1);
	// Of several ranges only the first would be remembered.
	if (op == OP_DRV_OUT || !bio || (op == OP_DISCARD && bio->bi_next))
		return 0;
	slot->sector = rq->__sector;
	slot->bytes = bytes;
	slot->op = op;
	FETCHED(__sync_lock_test_and_set(&slot->left[0], bytes >> SECTOR_SHIFT));
	FETCHED(__sync_lock_test_and_set(&slot->left[1], bytes >> SECTOR_SHIFT));
	return 0;
}

// The driver gave it back: it will be issued again.
INLINE int on_requeue(struct request *rq)
{
	struct slot *slot;

	if (!(rq->cmd_flags & OP_WRITE_BIT) || !is_ours(rq->q->disk))
		return 0;
	slot = slot_of(rq);
	if (slot)
		slot->left[0] = slot->left[1] = 0;
	return 0;
}

INLINE void seen_complete(u32 copy, struct request *rq, u32 bytes)
{
	struct slot *slot = slot_of(rq);
	u64 left, done = bytes >> SECTOR_SHIFT;

	if (!slot)
		return;
	left = slot->left[copy];
	slot->left[copy] = left > done ? left - done : 0;
}

// A partition's bio has the sector of the whole disk by now.
INLINE int on_queue(u32 copy, struct bio *bio)
{
	u32 op = bio->bi_opf & OP_MASK, bytes = bio->bi_iter.bi_size;
	u64 sector = bio->bi_iter.bi_sector;

	if (!(op & OP_WRITE_BIT) || !bytes || !is_ours(bio->bi_bdev->bd_disk))
		return 0;
	mark(sector, bytes);
	if (cfg_bio_based) {
		u64 key = (u64)bio + copy;
		struct extent extent = { sector, bytes };

		if (bpf_map_update_elem(&stash, &key, &extent, 0))
			count(copy, C_DOUBT_STASH, 1);
	}
	count(copy, with_discards(op) ? C_QUEUED_DISCARD : C_QUEUED, bytes >> SECTOR_SHIFT);
	return 0;
}

// Comes before the kernel counts the same bytes (blk_update_request, blk_complete_request).
INLINE int on_request(u32 copy, struct request *rq, u32 bytes)
{
	u32 op = rq->cmd_flags & OP_MASK;
	struct bio *bio = rq->bio;

	if (!(op & OP_WRITE_BIT) || !is_ours(rq->q->disk))
		return 0;
	if (op == OP_DRV_OUT) {
		count(copy, C_DOUBT_OPAQUE, 1);
		return 0;
	}
	// Without a bio nothing is left of the request: the kernel counts nothing either.
	if (!bio || !bytes)
		return 0;
	if (cfg_completion_marks && op == OP_DISCARD) {
		// One request may discard several ranges: one a bio.
		struct walk walk = { bio };

		bpf_loop(DISCARD_BIOS_MAX, mark_bio, &walk, 0);
		if (walk.bio)
			count(copy, C_DOUBT_RANGES, 1);
	} else if (cfg_completion_marks) {
		mark(rq->__sector, bytes);
	}
	if (!cfg_bio_based) {
		seen_complete(copy, rq, bytes);
		count(copy, with_discards(op) ? C_DONE_DISCARD : C_DONE, bytes >> SECTOR_SHIFT);
	}
	return 0;
}

// A bio-based device ends every bio here; any other one only those that never became a request.
INLINE int on_bio(u32 copy, struct bio *bio)
{
	u32 op = bio->bi_opf & OP_MASK;
	u64 sector = bio->bi_iter.bi_sector, bytes = bio->bi_iter.bi_size;

	if (!(op & OP_WRITE_BIT))
		return 0;
	if (cfg_bio_based) {
		u64 key = (u64)bio + copy;
		// Before the device is asked: on its way down the bio may have been given another one.
		struct extent *extent = bpf_map_lookup_elem(&stash, &key);

		if (extent) {
			sector = extent->sector;
			bytes = extent->bytes;
			bpf_map_delete_elem(&stash, &key);
		} else {
			if (!bytes || !is_ours(bio->bi_bdev->bd_disk))
				return 0;
			// A piece that was split off was never queued. It completes into the bio that it is
			// a piece of, and that one completes later, whole: it is marked and counted then.
			key = (u64)bio->bi_private + copy;
			if (bpf_map_lookup_elem(&stash, &key))
				return 0;
			count(copy, C_DOUBT_STASH, 1);
		}
		if (cfg_completion_marks)
			mark(sector, bytes);
		count(copy, with_discards(op) ? C_DONE_DISCARD : C_DONE, bytes >> SECTOR_SHIFT);
		return 0;
	}
	if (!bytes || !is_ours(bio->bi_bdev->bd_disk))
		return 0;
	if (cfg_completion_marks)
		mark(sector, bytes);
	count(copy, with_discards(op) ? C_FAILED_DISCARD : C_FAILED, bytes >> SECTOR_SHIFT);
	return 0;
}

#define COPY(n) \
	SEC("tp_btf/block_bio_queue") int queue##n(u64 *ctx) { return on_queue(n, (void *)ctx[0]); } \
	SEC("tp_btf/block_rq_complete") int request##n(u64 *ctx) { return on_request(n, (void *)ctx[0], ctx[2]); } \
	SEC("tp_btf/block_bio_complete") int bio##n(u64 *ctx) { return on_bio(n, (void *)ctx[1]); }

COPY(0)
COPY(1)

SEC("tp_btf/block_rq_issue") int issue(u64 *ctx) { return on_issue((void *)ctx[0]); }
SEC("tp_btf/block_rq_requeue") int requeue(u64 *ctx) { return on_requeue((void *)ctx[0]); }

char _license[] SEC("license") = "Dual MIT/GPL";
